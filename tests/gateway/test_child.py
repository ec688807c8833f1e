"""A child's output comes through whole, whatever it is like, and ending a child waits for nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from gateway.child import LONGEST_LINE, Child
from tests.support.process_groups import processes_of_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


async def start(program: str, *arguments: str) -> Child:
    command = [sys.executable, "-c", program, *arguments]
    return await Child.start(command, environment=os.environ, cwd=Path.cwd())


def run_to_its_end(program: str) -> int:
    async def test() -> int:
        child = await start(program)
        exit_code = await child.wait()
        await child.kill()
        assert processes_of_group(child.pid) == []
        return exit_code

    return asyncio.run(test())


def test_both_outputs_come_through_unchanged(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    program = (
        "import os\n"
        "os.write(1, b'one\\n\\xff\\x00two\\r\\n\\nno end')\n"
        "os.write(2, b'complaint\\n')\n"
        "raise SystemExit(3)"
    )

    exit_code = run_to_its_end(program)

    assert exit_code == 3
    assert capfdbinary.readouterr() == (b"one\n\xff\x00two\r\n\nno end", b"complaint\n")


def test_a_line_of_any_length_comes_through(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    length = 3 * LONGEST_LINE + 17

    run_to_its_end(f"print('x' * {length}); print('the next')")

    assert capfdbinary.readouterr().out == b"x" * length + b"\nthe next\n"


def test_a_full_disk_behind_our_output_does_not_stop_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A pipe holds 64 KiB: a child that nobody reads would hang.
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=1 << 13)

    class Sink:
        buffer = full

    monkeypatch.setattr(sys, "stdout", Sink())

    assert run_to_its_end("for line in range(100_000): print('line', line)") == 0
    full.raw.close()


def test_the_end_is_told_although_a_grandchild_holds_the_output() -> None:
    program = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        "os.kill(os.getpid(), 9)"
    )

    assert run_to_its_end(program) == -signal.SIGKILL


def test_whoever_left_the_group_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(3600)']\n"
        "print(subprocess.Popen(sleeper, start_new_session=True).pid, file=open(sys.argv[1], 'w'))"
    )

    async def test() -> None:
        child = await start(program, str(tmp_path / "pid"))
        await child.wait()
        await child.kill()

    asyncio.run(test())
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def test_a_program_that_is_missing_leaves_nothing_open(tmp_path: Path) -> None:
    async def test() -> None:
        before = open_descriptors()
        with pytest.raises(FileNotFoundError, match="missing"):
            await Child.start([str(tmp_path / "missing")], environment={}, cwd=tmp_path)
        await asyncio.sleep(0)  # asyncio closes in its next round

        assert open_descriptors() == before

    asyncio.run(test())


def test_killing_ends_what_ignores_a_request_to_end() -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        "time.sleep(3600)"
    )

    async def test() -> None:
        child = await start(program)
        while len(processes_of_group(child.pid)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        child.terminate()
        assert child.exit_code is None
        await child.kill()
        assert child.exit_code == -signal.SIGKILL
        assert processes_of_group(child.pid) == []

    asyncio.run(test())
