"""Callers who leave, and those who come for the same prediction at that moment, at the real gateway."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from tests.conftest import Buckets
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, holding, small_runner


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def gateway(
    s3: EmbeddedS3, buckets: Buckets, tmp_path: Path, journal: Path
) -> Iterator[GatewayServer]:
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": buckets.images,
        "COG_MAX_CONCURRENCY": "2",
        "JOURNAL": str(journal),
    }
    with GatewayServer(environment, small_runner(tmp_path / "runner")) as running:
        yield running
    assert "Traceback" not in running.logs


def test_who_comes_while_a_left_prediction_is_put_away_gets_it_made_anew(
    gateway: GatewayServer, s3: EmbeddedS3, buckets: Buckets, journal: Path
) -> None:
    with contextlib.ExitStack() as stack:
        with holding(gateway.cwd, "left"):
            with gateway.asking("left", {"prompt": "left"}):
                # The end of the first is being recorded for as long as it takes the others to come.
                record = "predictions/left.json"
                hold = Fault("hold", method="PUT", bucket=buckets.images, key=record, times=1)
                stack.enter_context(s3.fault(hold))
            s3.wait_for_held_request()
        back = [stack.enter_context(gateway.sent("left", {"prompt": "left"})) for _ in range(2)]
        # What is answered after they were sent was asked while they waited.
        for _ in range(10):
            assert gateway.get("/predictions/left").json()["status"] == "processing"
        s3.clear_faults()
        assert gateway.get("/live").is_success
        answers = [connection.getresponse() for connection in back]
        told = [json.loads(answer.read()) for answer in answers]
    # One of them makes it, and the other is told that it runs, or what it came to.
    assert HTTPStatus.OK in {answer.status for answer in answers}
    assert {answer.status for answer in answers} <= {HTTPStatus.OK, HTTPStatus.ACCEPTED}
    assert {answer["status"] for answer in told} <= {"starting", "processing", "succeeded"}
    assert gateway.get("/predictions/left").json()["status"] == "succeeded"
    assert journal.read_text().splitlines() == ["left", "left"]


def test_a_caller_who_leaves_a_prediction_to_others_does_not_take_it_from_them(
    gateway: GatewayServer, journal: Path
) -> None:
    given = {"prompt": "shared"}
    with ThreadPoolExecutor(1) as callers:
        with holding(gateway.cwd, "shared"):
            first = callers.submit(gateway.put, "shared", given)
            gateway.until(
                lambda: gateway.get("/predictions/shared").json().get("status") == "processing"
            )
            with gateway.asking("shared", given):
                pass
            for _ in range(10):
                assert gateway.get("/predictions/shared").json()["status"] == "processing"
        assert first.result(TIMEOUT_S).json()["status"] == "succeeded"
    assert journal.read_text().splitlines() == ["shared"]


def test_what_nobody_waits_for_any_more_frees_its_slot(gateway: GatewayServer) -> None:
    for name in ("one", "two", "three"):
        with gateway.asking(name, {"prompt": name, "seconds": 60}):
            pass
    gateway.until(lambda: gateway.get("/status").json()["queue"]["running"] == 0)
    assert gateway.put("four", {"prompt": "four"}).json()["status"] == "succeeded"
    for name in ("one", "two", "three"):
        assert gateway.get(f"/predictions/{name}").json()["status"] == "canceled"


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_who_hangs_up_at_once_is_not_worked_for(gateway: GatewayServer, accept: str) -> None:
    body = json.dumps({"input": {"prompt": "nobody", "seconds": 60}})
    for number in range(20):
        head = (
            f"PUT /predictions/{number} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
            f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as connection:
            connection.sendall(f"{head}{body}".encode())
            if number % 2:  # it has begun to look after this one
                gateway.get("/live")
    for number in range(20):
        gateway.until(
            lambda number=number: (
                gateway.get(f"/predictions/{number}").json().get("status") == "canceled"
            )
        )
    gateway.until(lambda: gateway.get("/status").json()["queue"]["running"] == 0)
