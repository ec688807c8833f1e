"""The helper that runs the real Cog server keeps its promises; Cog's own behaviour is not tested here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cog_server import CogServer, ServerDiedError, pytest_runtest_makereport
from tests.support.process_groups import left_of_group, processes_of_group

HERE = Path(__file__).parent
RUNNER = "runner_for_cog_server.py:Runner"


@pytest.fixture(scope="module")
def server() -> Iterator[CogServer]:
    with CogServer({"GREETING": "hello"}, cwd=HERE, runner=RUNNER) as running:
        yield running


def test_a_prediction_is_answered(server: CogServer) -> None:
    response = server.predict({"prompt": "cat"})

    assert (response.status, response.body["status"]) == (200, "succeeded")
    assert response.body["output"] == ["CAT"]


def test_an_id_and_headers_are_passed_on(server: CogServer) -> None:
    response = server.predict({"prompt": "cat"}, id="mine", headers={"Prefer": "respond-async"})

    assert response.status == 202
    assert response.body["id"] == "mine"


def test_a_failure_of_the_runner_is_an_answer(server: CogServer) -> None:
    response = server.predict({"prompt": "fail"})

    assert response.body["status"] == "failed"
    assert "no such luck" in response.body["error"]


def test_the_log_can_be_waited_for_and_read(server: CogServer) -> None:
    server.predict({"prompt": "something to find"})

    server.wait_for_log("running something to find")

    assert "running something to find" in server.logs
    with pytest.raises(AssertionError, match="never said 'nothing of the kind'"):
        server.wait_for_log("nothing of the kind", timeout=0.01)


def test_the_runner_sees_only_the_given_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from outside")
    monkeypatch.setenv("MODEL_PATH", "from outside")

    with CogServer({"GREETING": "hello"}, cwd=HERE, runner=RUNNER) as server:
        server.wait_for_log("GREETING")
        seen = server.logs

    assert "AWS_ACCESS_KEY_ID" not in seen
    assert "MODEL_PATH" not in seen


def test_a_failed_setup_is_a_state_to_look_at() -> None:
    with CogServer({"SETUP": "fails"}, cwd=HERE, runner=RUNNER) as server:
        health = server.health()

    assert health["status"] == "SETUP_FAILED"
    assert "the bucket refused: try another key" in health["setup"]["logs"]


def test_a_server_that_cannot_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerDiedError, match="COG_PREDICT_TYPE_STUB"),
        CogServer({"COG_PREDICT_TYPE_STUB": ""}, cwd=tmp_path),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("environment", [{}, {"SETUP": "never ends"}])
def test_nothing_is_left_when_the_block_ends(environment: dict[str, str]) -> None:
    server = CogServer(environment, cwd=HERE, runner=RUNNER, setup_timeout=2)
    with server:
        group = os.getpgid(server.pid)
        running = processes_of_group(group)

    assert running
    assert left_of_group(group) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_when_the_server_was_killed() -> None:
    with CogServer({}, cwd=HERE, runner=RUNNER) as server:
        group = server.pid
        os.kill(server.pid, 9)

    assert left_of_group(group) == []


def test_a_failing_block_shows_the_server_s_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with CogServer({}, cwd=HERE, runner=RUNNER) as server:
            server.predict({"prompt": "the last thing asked"})
            server.wait_for_log("the last thing asked")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()

    assert "the last thing asked" in capsys.readouterr().err


def test_a_failing_test_shows_the_log_of_a_server_that_other_tests_share(
    server: CogServer,
) -> None:
    server.predict({"prompt": "asked of the shared one"})
    server.wait_for_log("asked of the shared one")
    report = pytest.TestReport("a test", ("", 0, ""), {}, "failed", "why", "call")

    hook = pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)

    assert "asked of the shared one" in dict(report.sections)[f"Cog server at {server.url}"]
