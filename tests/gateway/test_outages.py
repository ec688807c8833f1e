"""A bucket that is gone, or does not answer, and a disk that is full: each is told, and the real gateway goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from images.prediction import record_name
from tests.conftest import Buckets
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, holding, small_runner

# How long answers that are on their way may take at the end (gateway/server.py), with time for the rest of it.
LAST_S = 5.0 + 4.0
GRACE_S = 1.0
EVERY_METHOD = ("GET", "PUT", "POST", "DELETE", "HEAD")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def environment(s3: EmbeddedS3, buckets: Buckets) -> dict[str, str]:
    return {**s3.environment(), "PUBLIC_BUCKET_NAME": buckets.images, "COG_MAX_CONCURRENCY": "4"}


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def outcomes(gateway: GatewayServer, callers: ThreadPoolExecutor) -> list[httpx.Response]:
    """What is answered to everything that needs the bucket."""
    asked = [
        callers.submit(gateway.put, "new", {"prompt": "new"}),
        callers.submit(gateway.put, "later", {"prompt": "x"}, headers={"Prefer": "respond-async"}),
        callers.submit(gateway.post, "/predictions", json={"input": {"prompt": "without an id"}}),
        callers.submit(gateway.get, "/predictions/old"),
        callers.submit(gateway.get, "/predictions"),
        callers.submit(gateway.post, "/predictions/old/cancel"),
    ]
    return [one.result(TIMEOUT_S) for one in asked]


def assert_told(answers: list[httpx.Response], secret: str) -> None:
    for answer in answers:
        assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE, answer.text
        assert "bucket" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) > 0
        assert secret not in answer.text


def test_a_bucket_that_is_gone_is_told_and_what_runs_meanwhile_is_kept(
    environment: dict[str, str],
    runner: Path,
    s3: EmbeddedS3,
    buckets: Buckets,
    callers: ThreadPoolExecutor,
) -> None:
    secret = s3.admin.secret_access_key
    with GatewayServer(environment, runner) as gateway:
        assert gateway.put("old", {"prompt": "old"}).is_success
        try:
            with holding(runner, "running"):
                running = callers.submit(gateway.put, "running", {"prompt": "running"})
                gateway.until(
                    lambda: gateway.get("/predictions/running").json().get("status") == "processing"
                )
                for method in EVERY_METHOD:
                    s3.inject(Fault("status", bucket=buckets.images, method=method, status=500))
            answers = outcomes(gateway, callers)
            stream = gateway.post(
                "/predictions",
                json={"input": {"prompt": "streamed"}},
                headers={"Accept": "text/event-stream"},
            )
            assert gateway.get("/live").is_success
        finally:
            s3.clear_faults()
        kept = running.result(TIMEOUT_S)
        old, new = gateway.get("/predictions/old"), gateway.put("new", {"prompt": "new"})

    assert_told(answers, secret)
    # It had begun to be answered before anybody knew, and ends without an end: whoever reads it asks again.
    assert stream.status_code == HTTPStatus.OK
    assert "event: completed" not in stream.text
    assert kept.json()["status"] == "succeeded"
    assert record_of(s3, buckets.images, "running")["status"] == "succeeded"
    assert old.json()["status"] == new.json()["status"] == "succeeded"
    assert f"s3://{buckets.images}/predictions/" in gateway.logs
    assert secret not in gateway.logs
    assert "Traceback" not in gateway.logs


def test_a_bucket_that_does_not_answer_holds_up_no_caller_and_no_stop(
    environment: dict[str, str],
    runner: Path,
    s3: EmbeddedS3,
    buckets: Buckets,
    callers: ThreadPoolExecutor,
) -> None:
    with GatewayServer(environment, runner) as gateway:
        assert gateway.put("old", {"prompt": "old"}).is_success
        try:
            for method in EVERY_METHOD:
                s3.inject(Fault("hold", bucket=buckets.images, method=method))
            answers = outcomes(gateway, callers)
            assert gateway.get("/live").is_success
            gateway.terminate()
            code = gateway.process.wait(TIMEOUT_S)
        finally:
            s3.clear_faults()

    assert_told(answers, s3.admin.secret_access_key)
    assert "did not answer within" in gateway.logs
    assert code == 0
    assert "Traceback" not in gateway.logs


@pytest.fixture
def stopping(
    environment: dict[str, str],
    runner: Path,
    s3: EmbeddedS3,
    buckets: Buckets,
    callers: ThreadPoolExecutor,
) -> Iterator[tuple[GatewayServer, Future[httpx.Response]]]:
    """A gateway that was told to stop, and a caller who waits for an image that the bucket does not give."""
    short = {"STORE_IMAGES": "1", "SHUTDOWN_GRACE_SECONDS": str(GRACE_S)}
    with GatewayServer(environment | short, runner) as gateway:
        try:
            s3.inject(Fault("hold", bucket=buckets.images, method="GET", key="*.png"))
            asked = callers.submit(gateway.post, "/predict", json={"prompt": "x"})
            s3.wait_for_held_request()
            gateway.terminate()
            yield gateway, asked
        finally:
            s3.clear_faults()


def test_an_image_that_the_bucket_does_not_give_holds_up_no_stop(
    stopping: tuple[GatewayServer, Future[httpx.Response]],
) -> None:
    """A thread waits for it, three times 5 s if need be, and is not waited for."""
    gateway, _ = stopping

    assert gateway.process.wait(GRACE_S + LAST_S) == 0


def test_who_waits_for_an_image_at_the_end_is_told(
    stopping: tuple[GatewayServer, Future[httpx.Response]],
) -> None:
    gateway, asked = stopping

    answer = asked.result(TIMEOUT_S)
    gateway.process.wait(TIMEOUT_S)

    assert answer.status_code in (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
    assert answer.json()["detail"]
    assert "Traceback" not in gateway.logs


def test_a_full_disk_stops_nothing(environment: dict[str, str], runner: Path) -> None:
    """No file can be written: not a temporary one, and not the log. A limit of 0 bytes does that to any file, and
    /dev/full is what a log on a full disk is."""
    gateway = GatewayServer(environment, runner)
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"ulimit -f 0; exec {sys.executable} -m gateway > /dev/full 2>&1"],
        cwd=runner,
        env=gateway.environment,
    )
    try:
        until_ready(gateway, process)
        answers = [gateway.put(f"{number}", {"prompt": "x" * 5000}) for number in range(3)]
        wrong = gateway.put("wrong", {"seconds": "no number"})
        status = gateway.get("/status").json()
        process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT_S)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)

    assert [answer.json()["status"] for answer in answers] == ["succeeded"] * 3
    assert wrong.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    assert status["cold_start"] is None
    assert code == 0


def until_ready(gateway: GatewayServer, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        assert process.poll() is None
        try:
            if gateway.get("/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not get ready")


def record_of(s3: EmbeddedS3, bucket: str, prediction_id: str) -> dict[str, Any]:
    key = f"predictions/{record_name(prediction_id)}.json"
    body = s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
    record: dict[str, Any] = json.loads(body)
    return record
