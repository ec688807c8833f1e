"""Cog's real server is run, watched and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gateway.cog_process import CogGaveUpError
from gateway.cog_status import State
from gateway.patience import Patience
from tests.gateway.watching import NEVER_S, QUICK, environment, line_of, run, watched, worker_of
from tests.support.process_groups import processes_of_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# Serving


def test_it_becomes_ready_and_serves_at_its_address() -> None:
    async def test() -> None:
        async with watched() as it:
            ready = await it.until(State.READY)
            answer = await it.predict("cat")

            assert answer["output"] == "CAT"
            assert it.cog.address.startswith("http://127.0.0.1:")
            assert it.states()[:2] == [State.STARTING, State.READY]
            assert ready.serving
            assert ready.reason is None
            assert ready.setup is not None
            assert ready.setup.error is None
            assert ready.setup.started_at is not None
            assert ready.setup.completed_at is not None
            assert ready.setup.completed_at >= ready.setup.started_at

    run(test)


def test_all_slots_taken_is_still_serving() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            running = asyncio.create_task(it.predict("cat", 1))
            busy = await it.until(State.BUSY)
            await running

            assert busy.serving
            assert (await it.until(State.READY)).restarts == 0

    run(test)


def test_output_is_passed_through(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with watched(environment=environment(LOG_FORMAT="console")) as it:
            await it.until(State.READY)
            await it.predict("a cat to find")
            await line_of(lambda: "".join(capfd.readouterr()), "running a cat to find")

    run(test)


# Dying


def test_a_dead_worker_is_noticed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with watched(environment=environment(SECRET="hunter2")) as it:
            await it.until(State.READY)
            first = it.cog.pid
            failed = await it.predict("die")
            dead = await it.until(State.DEAD)
            again = await it.until(State.READY, restarts=1)

            assert failed["status"] == "failed"
            assert dead.reason is not None
            assert "worker of Cog's server died" in dead.reason
            assert it.cog.pid != first
            assert again.reason is None
            assert (await it.predict("cat"))["output"] == "CAT"

    run(test)
    assert "worker of Cog's server died" in caplog.text
    assert "hunter2" not in caplog.text


def test_the_death_of_an_idle_worker_is_noticed() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            os.kill(worker_of(it.cog), signal.SIGKILL)
            await it.until(State.READY, restarts=1)

            assert (await it.predict("cat"))["output"] == "CAT"

    run(test)


def test_a_killed_server_takes_its_worker_along_and_is_replaced() -> None:
    async def test() -> None:
        async with watched() as it:
            await it.until(State.READY)
            group = it.cog.pid
            assert group is not None
            running = asyncio.create_task(it.predict("cat", NEVER_S))
            await it.until(State.BUSY)
            os.kill(group, signal.SIGKILL)
            starting = await it.until(State.STARTING, restarts=1)

            assert processes_of_group(group) == []  # never two at once
            assert starting.reason is not None
            assert "SIGKILL" in starting.reason
            with pytest.raises(httpx.TransportError):
                await running
            await it.until(State.READY)

    run(test)


def test_the_given_port_is_kept_by_the_next_life() -> None:
    async def test() -> None:
        async with watched() as finder:
            await finder.until(State.READY)
            port = int(finder.cog.address.rpartition(":")[2])
        async with watched(port=port) as it:
            await it.until(State.READY)
            await it.predict("die")
            await it.until(State.READY, restarts=1)

            assert it.cog.address == f"http://127.0.0.1:{port}"
            assert (await it.predict("cat"))["output"] == "CAT"

    run(test)


def test_a_server_that_stands_still_counts_as_dead() -> None:
    async def test() -> None:
        patience = replace(QUICK, answer_within_s=0.3, silent_s=1.0)
        async with watched(patience) as it:
            await it.until(State.READY)
            assert it.cog.pid is not None
            os.kill(it.cog.pid, signal.SIGSTOP)
            dead = await it.until(State.DEAD)

            assert dead.reason is not None
            assert "no sensible answer" in dead.reason

    run(test)


def test_a_server_that_answers_nonsense_counts_as_dead() -> None:
    server = (
        "import http.server, os\n"
        "address = ('127.0.0.1', int(os.environ['PORT']))\n"
        "http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()"
    )

    async def test() -> None:
        patience = replace(QUICK, first_answer_s=0.5, deaths_in_row=1)
        async with watched(patience, command=[sys.executable, "-c", server]) as it:
            with pytest.raises(CogGaveUpError, match="no sensible answer"):
                await it.running

    run(test)


def test_a_caller_who_met_a_failure_can_have_it_looked_into() -> None:
    async def test() -> None:
        async with watched(replace(QUICK, poll_s=NEVER_S)) as it:
            await it.until(State.READY)
            await it.predict("die")
            it.cog.look()
            await it.until(State.READY, restarts=1)

    run(test)


def test_deaths_in_a_row_are_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        patience = replace(QUICK, deaths_in_row=3)
        async with watched(patience, environment=environment(COG_PREDICT_TYPE_STUB="")) as it:
            with pytest.raises(CogGaveUpError, match="died 3 times in a row") as error:
                await it.running

            assert "exit code 1" in str(error.value)
            assert it.cog.status.state is State.STOPPED
            assert it.cog.status.reason == str(error.value)
            assert it.cog.status.restarts == 2

    run(test)
    # What it said itself reached our own standard error.
    assert (
        capfd.readouterr().err.count("COG_PREDICT_TYPE_STUB environment variable is not set") == 3
    )


def test_a_life_that_served_long_enough_ends_the_row() -> None:
    async def test() -> None:
        async with watched(replace(QUICK, deaths_in_row=2, good_life_s=0.0)) as it:
            for restarts in range(3):
                await it.until(State.READY, restarts=restarts)
                await it.predict("die")
                await it.until(State.DEAD)
            await it.until(State.READY, restarts=3)

    run(test)


def test_a_server_that_cannot_be_started_is_given_up(tmp_path: Path) -> None:
    async def test() -> None:
        missing = [str(tmp_path / "missing")]
        async with watched(replace(QUICK, deaths_in_row=2), command=missing) as it:
            with pytest.raises(CogGaveUpError, match=r"could not be started.*missing"):
                await it.running

    run(test)


@pytest.mark.parametrize(
    ("state", "pauses"),
    [
        (State.DEAD, [1, 2, 4, 8, 16, 30, 30]),
        (State.SETUP_FAILED, [5, 10, 20, 40, 80, 120, 120]),
    ],
)
def test_pauses_double_up_to_a_ceiling(state: State, pauses: list[float]) -> None:
    assert [Patience().pause_s(state, in_row) for in_row in range(1, 8)] == pauses


# A setup that fails


def test_a_failed_setup_is_told_with_its_reason() -> None:
    async def test() -> None:
        patience = replace(QUICK, setup_first_pause_s=NEVER_S, setup_longest_pause_s=NEVER_S)
        async with watched(patience, environment=environment(SETUP="fails")) as it:
            failed = await it.until(State.SETUP_FAILED)

            assert not failed.serving
            assert failed.reason is not None
            assert "the bucket refused: try another key" in failed.reason
            assert failed.setup is not None
            assert failed.setup.error == "RuntimeError: the bucket refused: try another key"

    run(test)


def test_a_setup_that_takes_too_long_has_failed() -> None:
    async def test() -> None:
        patience = replace(QUICK, setup_failures_in_row=1)
        variables = environment(SETUP="never ends", COG_SETUP_TIMEOUT="1")
        async with watched(patience, environment=variables) as it:
            with pytest.raises(CogGaveUpError, match=r"setup failed: .*COG_SETUP_TIMEOUT"):
                await it.running

    run(test)


def test_a_setup_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    async def test() -> None:
        variables = environment(SETUP="fails once", SETUP_MARKER=str(tmp_path / "marker"))
        async with watched(environment=variables) as it:
            ready = await it.until(State.READY)
            starting_again = next(status for status in it.seen if status.restarts == 1)

            assert starting_again.state is State.STARTING
            assert starting_again.reason is not None
            assert "the network is away" in starting_again.reason
            assert ready.reason is None
            assert ready.restarts == 1

    run(test)


def test_a_setup_that_goes_on_failing_is_given_up() -> None:
    async def test() -> None:
        patience = replace(QUICK, setup_failures_in_row=2)
        async with watched(patience, environment=environment(SETUP="fails")) as it:
            with pytest.raises(
                CogGaveUpError, match=r"setup failed 2 times in a row.*try another key"
            ):
                await it.running

    run(test)
