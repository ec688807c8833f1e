"""A child process, its process group and its output, for as long as one life of it lasts.

It knows nothing of Cog. Its promise: nothing of the group outlives `kill()`, nor this process's own end.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

LONGEST_LINE = 1 << 20
_GONE_WITHIN_S = 10.0
_POLL_S = 0.01
_LAST_LINES_WITHIN_S = 1.0

# Reads the group's number, then waits. A line means that the group is gone; the end of the file without one, that
# whoever held the other end is gone, in whatever way, and left the group behind.
_GUARD = 'read -r group && [ -n "$group" ] || exit 0; read -r _ || kill -KILL "-$group"'


class GroupOutlivesKillError(Exception):
    """A process of the group still runs although it was killed."""


class Child:
    """A running process that leads a session and a process group of its own; made by `start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        guard: asyncio.subprocess.Process,
        outputs: Sequence["_Output"],
    ) -> None:
        self._process = process
        self._guard = guard
        self._outputs = outputs

    @classmethod
    async def start(
        cls, command: Sequence[str], *, environment: Mapping[str, str], cwd: Path
    ) -> "Child":
        """Start it, with its output passed through to ours, line by line and unchanged.

        Raises:
            OSError: it cannot be started.
        """
        guard = await _start_guard()
        outputs: list[_Output] = []
        process = None
        try:
            outputs.append(await _Output.open(sys.stdout))
            outputs.append(await _Output.open(sys.stderr))
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=cwd,
                env=dict(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=outputs[0].descriptor,
                stderr=outputs[1].descriptor,
                start_new_session=True,
            )
            for output in outputs:
                output.leave_to_child()
            if guard.stdin is not None:
                guard.stdin.write(f"{process.pid}\n".encode())
            return cls(process, guard, outputs)
        except BaseException:
            if process is not None:
                _kill_group(process.pid)
                await process.wait()
            for output in outputs:
                await output.close()
            await _release(guard)
            raise

    @property
    def pid(self) -> int:
        """Its process, and its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if one ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask it to end. What it started is its own to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def kill(self) -> None:
        """End whatever is left of the group, and return when all of it is gone.

        Raises:
            GroupOutlivesKillError: it is not, which only a driver that does not let go of a process can bring about.
        """
        _kill_group(self.pid)
        await self._process.wait()
        left = await _wait_until_gone(self.pid)
        for output in self._outputs:
            await output.close()
        if left:
            raise GroupOutlivesKillError(
                f"Of process group {self.pid}, {left} still run {_GONE_WITHIN_S:g} s after SIGKILL"
            )
        await _release(self._guard)


async def _start_guard() -> asyncio.subprocess.Process:
    """What ends the group when we are killed without a chance to do it.

    Linux could signal the child itself, but not what it started: a worker deep in its setup would keep the device.
    """
    return await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        _GUARD,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
        start_new_session=True,  # Ctrl-C, and what else is meant for our group, must not reach it
    )


async def _release(guard: asyncio.subprocess.Process) -> None:
    await guard.communicate(b"\n")


def _kill_group(group: int) -> None:
    # macOS says "not permitted" of a group of which only a zombie is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


async def _wait_until_gone(group: int) -> list[int]:
    """The processes that are still there in the end: none, but for a driver's fault."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _GONE_WITHIN_S
    # The system tells nobody but its parent that a process ended.
    while (left := list(_living(group))) and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    # As the first process of a container we are the parent of those whose own is gone.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:  # noqa: ASYNC222 - it does not wait
            pass
    return left


def _living(group: int) -> Iterator[int]:
    """Processes of the group that are more than zombies; without /proc none is found."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # ended meanwhile
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                yield int(stat.parent.name)


class _Output:
    """A pipe from the child, and what passes its lines on.

    It is not asyncio's own, because a process with one of those counts as running for as long as anybody holds its
    other end: a worker that outlives its server would hide the server's death.
    """

    def __init__(
        self, descriptor: int, transport: asyncio.ReadTransport, passing: asyncio.Task[None]
    ) -> None:
        self.descriptor: int | None = descriptor
        """The end to write to, until it is left to the child."""
        self._transport = transport
        self._passing = passing

    @classmethod
    async def open(cls, sink: TextIO) -> "_Output":
        read, write = os.pipe()
        source = asyncio.StreamReader(limit=LONGEST_LINE)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(source), os.fdopen(read, "rb", buffering=0)
        )
        return cls(write, transport, asyncio.create_task(_pass_through(source, sink)))

    def leave_to_child(self) -> None:
        """Close our copy of the end to write to: the output ends when the last copy is closed."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    async def close(self) -> None:
        """Pass on what is left, then stop listening."""
        self.leave_to_child()
        # Whoever left the group may hold the other end for ever: not somebody to wait for.
        await asyncio.wait([self._passing], timeout=_LAST_LINES_WITHIN_S)
        self._passing.cancel()
        self._transport.close()


async def _pass_through(source: asyncio.StreamReader, sink: TextIO) -> None:
    while line := await _next_line(source):
        # A full disk or a closed terminal must not stop the reading: the child would hang on its own log.
        with contextlib.suppress(OSError, ValueError):
            sink.buffer.write(line)
            sink.buffer.flush()


async def _next_line(source: asyncio.StreamReader) -> bytes:
    """A line with its end, a part of one that is longer than LONGEST_LINE, or nothing at the end."""
    try:
        return await source.readuntil(b"\n")
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    except asyncio.LimitOverrunError as overrun:
        return await source.readexactly(overrun.consumed)
