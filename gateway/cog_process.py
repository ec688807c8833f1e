"""Runs Cog's HTTP server as a child on loopback, watches it, and starts it again when it or its worker dies.

Cog does neither (0.23): a dead worker stays dead behind a health check of HTTP 200. What is said to callers
meanwhile is the door's business; it reads `status` and awaits `wait_for_change`.
"""

import asyncio
import json
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from gateway.child import Child, GroupOutlivesKillError
from gateway.cog_health import Condition, Health, Setup, read_health
from gateway.cog_status import State, Status
from gateway.patience import Patience

COMMAND = (sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1")
RUNNER = "predict.py:Runner"
SETUP_TIMEOUT_S = 900  # Cog itself waits for ever
_REPOSITORY = Path(__file__).resolve().parent.parent

_log = logging.getLogger(__name__)


class CogGaveUpError(Exception):
    """Cog's server is not started again; the message says why, and what may help."""


@dataclass(frozen=True)
class _End:
    """How a life ended: DEAD or SETUP_FAILED, and why."""

    state: State
    reason: str


class CogProcess:
    """Cog's server, kept running: `run()` in a task of its own, `status` and `wait_for_change` for everybody else.

    Args:
        session: for the health checks, with as many connections as are asked for (`cog_client.new_session`): an answer
            that waits for one is taken for a silent server.
        port: on 127.0.0.1; without one, a free one for each life.
        environment: what Cog sees; without it, our own. PORT and PATH are set on top, the runner and a limit for the
            setup where they are missing.
        cwd: the folder of the runner.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path = _REPOSITORY,
        command: Sequence[str] = COMMAND,
        patience: Patience | None = None,
    ) -> None:
        self._session = session
        self._given_port = port
        self._port = port or 0
        self._environment = dict(os.environ if environment is None else environment)
        self._cwd = cwd
        self._command = command
        self._patience = patience or Patience()

        self._child: Child | None = None
        self._status = Status(State.STARTING, datetime.now(UTC))
        self._changed = asyncio.Event()
        self._in_row = {State.DEAD: 0, State.SETUP_FAILED: 0}

        self._called = False
        self._finished = asyncio.Event()
        self._stopping = asyncio.Event()
        self._deadline = math.inf
        self._deadline_moved = asyncio.Event()
        self._look = asyncio.Event()

    @property
    def status(self) -> Status:
        return self._status

    @property
    def address(self) -> str:
        """Where it listens now; another life may listen elsewhere, so ask before each request."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the server, and of its process group; None between two lives."""
        return self._child.pid if self._child else None

    async def wait_for_change(self, seen: Status) -> Status:
        """The present status once it is not `seen`; at once where that is out of date. Short ones may be missed."""
        while self._status == seen:
            await self._changed.wait()
        return self._status

    def look(self) -> None:
        """Ask Cog for its state at once: a request just failed in a way that looks like its death."""
        self._look.set()

    async def run(self) -> None:
        """Keep it running until `stop()`. To be called once. Cancelling it kills Cog without grace.

        Raises:
            CogGaveUpError: it died, or its setup failed, too often in a row.
        """
        if self._called:
            raise RuntimeError("run() was called before: make a new CogProcess")
        self._called = True
        try:
            while not self._stopping.is_set():
                end = await self._live()
                if end is None:
                    break
                pause = self._pause_after(end)
                _log.warning("%s Started again in %g s.", end.reason, pause)
                if not await _within(pause, self._stopping.wait()):
                    self._tell(State.STARTING, restarts=self._status.restarts + 1)
        except CogGaveUpError as error:
            self._tell(self._status.state, reason=str(error))
            raise
        except GroupOutlivesKillError as error:
            message = f"{error}. A second Cog beside it would find the device taken: replace this machine."
            self._tell(State.DEAD, reason=message)
            raise CogGaveUpError(message) from error
        finally:
            self._tell(State.STOPPED)
            self._finished.set()

    async def stop(self, grace: float) -> None:
        """End it, and return when nothing of it is left. Safe to call at any time and again.

        Synchronous predictions get `grace` seconds to finish; asynchronous ones Cog drops. The shortest grace of
        several calls counts.
        """
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + grace)
        self._deadline_moved.set()
        self._stopping.set()
        if self._called:
            await self._finished.wait()
        else:
            self._tell(State.STOPPED)

    async def _live(self) -> _End | None:
        """One life, from its start until nothing of it is left; None when it was stopped."""
        if self._given_port is None:
            self._port = _free_port()
        try:
            self._child = child = await Child.start(
                self._command,
                environment=cog_environment(self._environment, self._port),
                cwd=self._cwd,
            )
        except OSError as error:
            return self._died(f"Cog's server could not be started: {error}.")
        try:
            end = await self._watch(child)
            if end is None:
                self._tell(State.STOPPING)
            child.terminate()
            await self._wait_for_end(
                child, math.inf if end is None else self._patience.last_words_s
            )
        finally:
            await asyncio.shield(child.kill())
            self._child = None
        return end

    async def _watch(self, child: Child) -> _End | None:
        """Return when the life is over: None because of `stop()`."""
        exited = asyncio.create_task(child.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        asked = asyncio.create_task(self._ask_until_dead(child))
        tasks = (exited, stopped, asked)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return None
            if exited.done():
                return self._died(_obituary(exited.result()))
            return asked.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_until_dead(self, child: Child) -> _End:
        patience, now = self._patience, asyncio.get_running_loop().time
        last_answer, serving_since, silences = now(), math.inf, 0
        allowed = patience.first_answer_s
        while True:
            self._look.clear()
            try:
                health = await self._ask()
            except (aiohttp.ClientError, OSError, ValueError) as error:
                silences += 1
                # Twice, so that a moment in which we ourselves stood still is not held against it.
                if silences > 1 and now() - last_answer > allowed:
                    return self._died(
                        f"Cog's server gave no sensible answer to {self.address}/health-check for "
                        f"{now() - last_answer:.0f} s ({type(error).__name__}: {error})."
                    )
            else:
                if child.exit_code is not None:  # whoever answers on its port is somebody else
                    return self._died(_obituary(child.exit_code))
                last_answer, silences, allowed = now(), 0, patience.silent_s
                end = self._heard(health)
                if end is not None:
                    return end
                serving_since = min(serving_since, now()) if self._status.serving else math.inf
                if now() - serving_since >= patience.good_life_s:
                    self._in_row = dict.fromkeys(self._in_row, 0)
            await _within(
                patience.poll_s if self._status.serving else patience.poll_starting_s,
                self._look.wait(),
            )

    async def _ask(self) -> Health:
        """One health check. Raises aiohttp.ClientError, OSError (TimeoutError) or ValueError where there is no sensible
        answer."""
        async with (
            asyncio.timeout(self._patience.answer_within_s),
            self._session.get(f"{self.address}/health-check", allow_redirects=False) as answer,
        ):
            health = read_health(json.loads(await answer.read()))
        if health.condition is Condition.WORKER_SLOW:
            raise TimeoutError(health.explanation)
        return health

    def _heard(self, health: Health) -> _End | None:
        match health.condition:
            case Condition.STARTING:
                self._tell(State.STARTING)
            case Condition.READY | Condition.BUSY:
                self._tell(State[health.condition.name], reason=None, setup=health.setup)
            case Condition.SETUP_FAILED:
                reason = f"The model's setup failed: {self._setup_error(health.setup)}"
                self._tell(State.SETUP_FAILED, reason=reason, setup=health.setup)
                return _End(State.SETUP_FAILED, reason)
            case _:
                detail = f" ({health.explanation})" if health.explanation else ""
                return self._died(
                    f"The worker of Cog's server died{detail}; its last lines in the log may say why. If they do not, "
                    "it was killed from outside, most often for want of memory."
                )
        return None

    def _setup_error(self, setup: Setup | None) -> str:
        if setup is None or setup.error is None:
            return "Cog names no reason"
        if setup.error != "worker setup timed out":
            return setup.error
        limit = cog_environment(self._environment, self._port)["COG_SETUP_TIMEOUT"]
        return f"{setup.error} after {limit} s; if it only needs longer, raise COG_SETUP_TIMEOUT"

    def _died(self, reason: str) -> _End:
        self._tell(State.DEAD, reason=reason)
        return _End(State.DEAD, reason)

    def _pause_after(self, end: _End) -> float:
        """Raises CogGaveUpError where it has ended like this often enough."""
        self._in_row[end.state] += 1
        in_row, allowed = self._in_row[end.state], self._patience.allowed_in_row(end.state)
        if in_row < allowed:
            return self._patience.pause_s(end.state, in_row)
        what = "The setup failed" if end.state is State.SETUP_FAILED else "Cog's server died"
        raise CogGaveUpError(
            f"{what} {in_row} times in a row, and it is not started again. The last time: {end.reason}"
        )

    async def _wait_for_end(self, child: Child, grace: float) -> None:
        """Until the server has ended, `grace` is over, or that of whoever stops it, which may shrink meanwhile."""
        now = asyncio.get_running_loop().time
        own = now() + grace
        while child.exit_code is None and (left := min(own, self._deadline) - now()) > 0:
            self._deadline_moved.clear()
            ends = [
                asyncio.create_task(child.wait()),
                asyncio.create_task(self._deadline_moved.wait()),
            ]
            try:
                await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()

    def _tell(self, state: State, **changes: object) -> None:
        since = self._status.since if state is self._status.state else datetime.now(UTC)
        changed = replace(self._status, state=state, since=since, **changes)  # type: ignore[arg-type]
        if changed == self._status:
            return
        self._status = changed
        self._changed.set()
        self._changed = asyncio.Event()


def cog_environment(base: Mapping[str, str], port: int) -> dict[str, str]:
    """`base`, and what Cog's server needs beside it."""
    here = str(Path(sys.executable).parent)
    return {
        "COG_PREDICT_TYPE_STUB": RUNNER,
        "COG_SETUP_TIMEOUT": str(SETUP_TIMEOUT_S),
        "PYTHONUNBUFFERED": "1",
        **base,
        "PORT": str(port),
        # Cog starts its worker as bare `python`: another one than ours would lack the packages.
        "PATH": os.pathsep.join([here, base.get("PATH", os.defpath)]),
    }


def _obituary(exit_code: int) -> str:
    if exit_code >= 0:
        how = f"ended with exit code {exit_code}; its last lines in the log say why."
    elif exit_code == -signal.SIGKILL:
        how = "was killed (SIGKILL), by hand or for want of memory: the kernel's log says which."
    else:
        how = f"was ended by {signal.Signals(-exit_code).name}; its last lines in the log may say why."
    return f"Cog's server {how}"


async def _within(seconds: float, awaited: Awaitable[object]) -> bool:
    """Whether it came before the time was over."""
    try:
        await asyncio.wait_for(awaited, seconds)
    except TimeoutError:
        return False
    return True


def _free_port() -> int:
    """A port that the system just gave out; Cog cannot choose one itself and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
