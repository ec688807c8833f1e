"""Cog's real server is stopped, at whatever it is, and nothing of it is ever left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest

from gateway.cog_client import new_session
from gateway.cog_process import CogProcess
from gateway.cog_status import State
from tests.gateway.watching import (
    NEVER_S,
    QUICK,
    REPOSITORY,
    SUPPORT,
    TIMEOUT_S,
    environment,
    line_of,
    run,
    watched,
)
from tests.support.process_groups import processes_of_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_running_prediction_finishes_before_the_stop() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            prediction = asyncio.create_task(it.predict("cat", 1.5))
            await it.until(State.BUSY)
            await asyncio.gather(it.cog.stop(TIMEOUT_S), it.cog.stop(TIMEOUT_S))
            await it.cog.stop(TIMEOUT_S)

            assert (await prediction)["output"] == "CAT"
            assert it.running.done()
            assert it.running.exception() is None
            assert it.states()[-2:] == [State.STOPPING, State.STOPPED]

    run(test)


def test_a_second_stop_can_shorten_the_grace_of_the_first() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            prediction = asyncio.create_task(it.predict("cat", NEVER_S))
            await it.until(State.BUSY)
            patient = asyncio.create_task(it.cog.stop(NEVER_S))
            await it.until(State.STOPPING)
            await it.cog.stop(0)
            await patient

            with pytest.raises(httpx.TransportError):
                await prediction

    run(test)


def test_it_can_be_stopped_while_the_setup_runs(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with watched(environment=environment(SETUP="never ends")) as it:
            await line_of(lambda: "".join(capfd.readouterr()), "setting up")
            group = it.cog.pid
            assert group is not None
            assert len(processes_of_group(group)) == 2
            await it.cog.stop(TIMEOUT_S)

            assert processes_of_group(group) == []

    run(test)


def test_it_can_be_stopped_at_its_very_start() -> None:
    async def test() -> None:
        async with watched() as it:
            await asyncio.sleep(0)  # run() has begun
            await it.cog.stop(TIMEOUT_S)

            assert it.running.done()

    run(test)


def test_it_can_be_stopped_between_two_lives() -> None:
    async def test() -> None:
        patience = replace(QUICK, first_pause_s=NEVER_S, longest_pause_s=NEVER_S)
        async with watched(patience) as it:
            await it.until(State.READY)
            await it.predict("die")
            await it.until(State.DEAD)
            await it.cog.stop(TIMEOUT_S)

            assert it.cog.status.restarts == 0

    run(test)


def test_stopped_before_it_ran_it_starts_nothing() -> None:
    async def test() -> None:
        async with new_session() as session:
            cog = CogProcess(session, environment=environment(), cwd=SUPPORT)
            await cog.stop(TIMEOUT_S)
            await cog.run()

            assert cog.status.state is State.STOPPED
            assert cog.pid is None

    run(test)


def test_it_runs_once() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            with pytest.raises(RuntimeError, match="make a new CogProcess"):
                await it.cog.run()

    run(test)


def test_cancelling_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with watched(environment=environment(SETUP="never ends")) as it:
            await line_of(lambda: "".join(capfd.readouterr()), "setting up")
            it.running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await it.running

    run(test)


def test_nothing_is_left_when_we_are_killed_ourselves() -> None:
    program = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from gateway.cog_client import new_session\n"
        "from gateway.cog_process import CogProcess\n"
        "async def main():\n"
        "    async with new_session() as session:\n"
        f"        cog = CogProcess(session, cwd=Path({str(SUPPORT)!r}))\n"
        "        running = asyncio.create_task(cog.run())\n"
        "        while cog.pid is None:\n"
        "            await asyncio.sleep(0.01)\n"
        "        print('group', cog.pid, flush=True)\n"
        "        await running\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment(SETUP="never ends"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as ours:
        assert ours.stdout is not None
        group = 0
        for line in ours.stdout:
            if line.startswith("group "):
                group = int(line.split()[1])
            if "setting up" in line:
                break
        before = processes_of_group(group)
        ours.kill()
    deadline = time.monotonic() + TIMEOUT_S
    while processes_of_group(group) and time.monotonic() < deadline:
        time.sleep(0.02)  # nobody is told when a grandchild ends

    assert len(before) == 2
    assert processes_of_group(group) == []
