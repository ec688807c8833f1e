"""When the gateway says that it is ready, and when it ends: the real one, before the real Cog server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from demo.s3 import EmbeddedS3
from gateway.keys import digest_of, new_key
from images.prediction import record_name
from tests.conftest import Buckets
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, free_port, holding, small_runner

KEY = new_key()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def environment(s3: EmbeddedS3, buckets: Buckets) -> dict[str, str]:
    return {**s3.environment(), "PUBLIC_BUCKET_NAME": buckets.images, "COG_MAX_CONCURRENCY": "2"}


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Probe:
    """A platform that asks `/ready` without a pause, and sends a prediction as soon as it is told that it may.

    It begins before the gateway does, so that it sees the first answer there is.
    """

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.readiness: list[int] = []
        """Every answer of /ready, in a row each kind once."""
        self.predictions: list[int] = []
        """What the predictions got that were asked for right after a 200."""
        self.lives: set[int] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        self._over.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            while not self._over.is_set():
                with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                    status = client.get("/ready").status_code
                    if status == HTTPStatus.OK:
                        made = client.post("/predictions", json={"input": {"prompt": "probe"}})
                        self.predictions.append(made.status_code)
                    if self.readiness[-1:] != [status]:
                        self.readiness.append(status)
                    self.lives.add(client.get("/live").status_code)
                self._over.wait(0.005)


def post(gateway: GatewayServer, prompt: str, **given: Any) -> httpx.Response:
    return gateway.post("/predictions", json={"input": {"prompt": prompt, **given}})


def record_of(s3: EmbeddedS3, bucket: str, prediction_id: str) -> dict[str, Any]:
    key = f"predictions/{record_name(prediction_id)}.json"
    record: dict[str, Any] = json.loads(
        s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
    )
    return record


def running(gateway: GatewayServer, count: int) -> bool:
    held: int = gateway.get("/status").json()["queue"]["running"]
    return held == count


def waiting(gateway: GatewayServer, count: int) -> bool:
    held: int = gateway.get("/status").json()["queue"]["waiting"]
    return held == count


def kill_cog(gateway: GatewayServer) -> None:
    """If it runs at this moment."""
    with contextlib.suppress(AssertionError, OSError):
        os.kill(gateway.cog_pid(), signal.SIGKILL)


def succeeded(asked: Future[httpx.Response]) -> bool:
    answer = asked.result(TIMEOUT_S)
    return answer.status_code == HTTPStatus.OK and answer.json()["status"] == "succeeded"


def test_it_is_not_ready_from_its_first_answer_until_a_prediction_is_made(
    environment: dict[str, str], runner: Path, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    port = free_port()
    with (
        Probe(port) as probe,
        GatewayServer(
            {**environment, "HOLD_SETUP": str(hold)}, runner, port=port, wait_until_ready=False
        ) as gateway,
    ):
        gateway.until(lambda: "setting up" in gateway.logs)
        ready, refused = gateway.get("/ready"), post(gateway, "too early")
        assert gateway.get("/health-check").json()["status"] == "STARTING"
        hold.unlink()
        gateway.until(lambda: len(probe.predictions) > 3)
        probe.end()

    assert ready.status_code == refused.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert ready.json() == {"status": "starting"}
    assert int(ready.headers["Retry-After"]) > 0
    assert int(refused.headers["Retry-After"]) > 0
    assert "not ready" in refused.json()["detail"]
    assert probe.readiness == [503, 200]
    assert set(probe.predictions) == {200}
    assert probe.lives == {200}


def test_a_setup_that_fails_is_told_to_who_may_know_and_tried_again(
    environment: dict[str, str], runner: Path, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    environment |= {"FAIL_SETUP": str(fault), "API_KEYS": f"ann:{digest_of(KEY)}"}
    known = {"Authorization": f"Bearer {KEY}"}
    with GatewayServer(environment, runner, wait_until_ready=False) as gateway:
        gateway.until(lambda: gateway.get("/status").json()["state"] == "setup_failed")
        ready = gateway.get("/ready")
        told, hidden = gateway.get("/status", headers=known).json(), gateway.get("/status")
        health, hidden_health = (
            gateway.get("/health-check", headers=known),
            gateway.get("/health-check"),
        )
        refused = gateway.post("/predictions", json={"input": {"prompt": "x"}}, headers=known)
        assert gateway.get("/live").status_code == HTTPStatus.OK
        fault.unlink()
        gateway.until(lambda: gateway.get("/ready").is_success)
        after = gateway.get("/status", headers=known).json()
        made = gateway.post("/predictions", json={"input": {"prompt": "x"}}, headers=known)

    assert (ready.status_code, ready.json()) == (503, {"status": "setup_failed"})
    assert "the bucket refused: try another key" in told["reason"]
    assert "the bucket refused: try another key" in told["setup"]["error"]
    assert "the bucket refused" not in hidden.text
    assert {"reason", "setup", "cold_start", "model"}.isdisjoint(hidden.json())
    assert health.json()["status"] == hidden_health.json()["status"] == "SETUP_FAILED"
    assert "the bucket refused" in health.text
    assert "the bucket refused" not in hidden_health.text
    assert refused.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert "setup_failed" in refused.json()["detail"]
    assert after["reason"] is None
    assert after["restarts"] == 1
    assert made.json()["status"] == "succeeded"


def test_a_killed_worker_s_predictions_and_those_in_line_are_made_by_the_next_one(
    environment: dict[str, str], runner: Path, callers: ThreadPoolExecutor
) -> None:
    prompts = [f"{number}" for number in range(5)]
    with GatewayServer(environment, runner) as gateway, Probe(gateway.port) as probe:
        with holding(runner, "probe", *prompts):
            asked = [callers.submit(post, gateway, prompt) for prompt in prompts]
            gateway.until(lambda: running(gateway, 2) and waiting(gateway, 4))
            os.kill(gateway.worker_pid(), signal.SIGKILL)
            gateway.until(lambda: "Started again in 1 s." in gateway.logs)
        gateway.until(lambda: gateway.get("/ready").is_success)
        assert all(map(succeeded, asked))
        probe.end()

    # Those that were asked for before anybody knew of the death were made too.
    assert set(probe.predictions) == {200}
    assert probe.lives == {200}


def test_deaths_in_a_row_end_it_and_no_caller_is_left_waiting(
    environment: dict[str, str], runner: Path, callers: ThreadPoolExecutor
) -> None:
    with GatewayServer(environment, runner) as gateway:
        asked = callers.submit(post, gateway, "waits", seconds=30)
        gateway.until(lambda: running(gateway, 1))
        while gateway.process.poll() is None:
            kill_cog(gateway)
            time.sleep(0.02)
        code = gateway.process.wait(TIMEOUT_S)
        answer = asked.result(TIMEOUT_S)

    assert code == 1
    assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert int(answer.headers["Retry-After"]) > 0
    assert "Cog's server died 5 times in a row, and it is not started again" in gateway.logs
    assert "Traceback" not in gateway.logs


def test_what_runs_at_sigterm_is_finished_and_nothing_new_is_taken(
    environment: dict[str, str],
    runner: Path,
    callers: ThreadPoolExecutor,
    s3: EmbeddedS3,
    buckets: Buckets,
) -> None:
    with GatewayServer(environment, runner) as gateway:
        with holding(runner, "sync", "async"):
            asked = callers.submit(gateway.put, "sync", {"prompt": "sync"})
            accepted = gateway.put(
                "async", {"prompt": "async"}, headers={"Prefer": "respond-async"}
            )
            gateway.until(lambda: running(gateway, 2))
            in_line = callers.submit(gateway.put, "in-line", {"prompt": "in line"})
            gateway.until(lambda: waiting(gateway, 1))

            gateway.terminate()
            gateway.until(lambda: not gateway.get("/ready").is_success)
            ready, refused = gateway.get("/ready"), gateway.put("late", {"prompt": "late"})
            state = gateway.get("/status").json()["state"]
            assert gateway.get("/live").status_code == HTTPStatus.OK
            again = gateway.put("sync", {"prompt": "sync"})
            assert not asked.done()
            gateway.terminate()

        assert succeeded(asked)
        given_back = in_line.result(TIMEOUT_S)
        code = gateway.process.wait(TIMEOUT_S)

    assert accepted.status_code == HTTPStatus.ACCEPTED
    assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
    assert state == "stopping"
    for answer in (refused, given_back):
        assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        assert int(answer.headers["Retry-After"]) > 0
    assert "about to stop" in refused.json()["detail"]
    assert again.status_code == HTTPStatus.ACCEPTED  # it joined what runs, which takes no card
    assert code == 0
    assert record_of(s3, buckets.images, "async")["status"] == "succeeded"
    assert record_of(s3, buckets.images, "in-line")["may_run_again"] is True
    assert "Traceback" not in gateway.logs


def test_what_is_not_finished_when_the_grace_is_over_is_given_back(
    environment: dict[str, str],
    runner: Path,
    callers: ThreadPoolExecutor,
    s3: EmbeddedS3,
    buckets: Buckets,
) -> None:
    with GatewayServer({**environment, "SHUTDOWN_GRACE_SECONDS": "0"}, runner) as gateway:
        asked = callers.submit(gateway.put, "sync", {"prompt": "sync", "seconds": 60})
        gateway.put("async", {"prompt": "x", "seconds": 60}, headers={"Prefer": "respond-async"})
        gateway.until(lambda: running(gateway, 2))
        gateway.until(lambda: gateway.get("/predictions/sync").json().get("status") == "processing")
        with httpx.stream(
            "PUT",
            f"{gateway.url}/predictions/async",
            json={"input": {"prompt": "x", "seconds": 60}},
            headers={"Accept": "text/event-stream"},
            timeout=TIMEOUT_S,
            trust_env=False,
        ) as told:
            gateway.terminate()
            events = told.read().decode()
        answer = asked.result(TIMEOUT_S)
        code = gateway.process.wait(TIMEOUT_S)

    assert code == 0
    assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert "with the same id" in answer.json()["detail"]
    assert record_of(s3, buckets.images, "sync")["may_run_again"] is True
    left = record_of(s3, buckets.images, "async")
    assert (left["status"], left["lease_seconds"]) == ("starting", 0.0)
    # It is not over: another gateway makes it.
    assert told.status_code == HTTPStatus.OK
    assert "event: completed" not in events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order_while_the_model_loads(
    environment: dict[str, str], runner: Path, tmp_path: Path, number: signal.Signals
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    environment |= {"HOLD_SETUP": str(hold)}
    with GatewayServer(environment, runner, wait_until_ready=False) as gateway:
        gateway.until(lambda: "setting up" in gateway.logs)
        gateway.process.send_signal(number)
        assert gateway.process.wait(TIMEOUT_S) == 0
    assert "Traceback" not in gateway.logs


def test_a_port_that_is_taken_is_named_and_nothing_is_started(
    environment: dict[str, str], runner: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "gateway"],
            cwd=runner,
            env=GatewayServer(environment, runner, port=port).environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    assert ended.returncode == 1
    assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use)" in ended.stderr
    assert "Set PORT" in ended.stderr
    assert "setting up" not in ended.stdout
    assert "Traceback" not in ended.stderr
