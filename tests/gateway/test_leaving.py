"""Callers who leave, and those who come for the same prediction at that moment, at the real gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from tests.conftest import Buckets
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, small_runner


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


@contextlib.contextmanager
def asked(gateway: GatewayServer, prediction_id: str, given: dict[str, object]) -> Iterator[None]:
    """A caller who waits from when it is under way until the end of the block, and then hangs up."""
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=TIMEOUT_S) as client:
        request = client.build_request(
            "PUT", f"/predictions/{prediction_id}", json={"input": given}
        )
        request.headers["Accept"] = "text/event-stream"
        answer = client.send(request, stream=True)
        lines = answer.iter_lines()  # held on to: they hang up when they are dropped
        next(line for line in lines if "start" in line)
        yield
        answer.close()


def test_who_comes_while_a_left_prediction_is_put_away_gets_it_made_anew(
    gateway: GatewayServer, s3: EmbeddedS3, buckets: Buckets, journal: Path
) -> None:
    given = {"prompt": "left", "seconds": 1.5}
    with asked(gateway, "left", given):
        # The end of the first is being recorded for as long as it takes the second to come.
        record = "predictions/left.json"
        s3.inject(Fault("hold", method="PUT", bucket=buckets.images, key=record, times=1))
    again = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=TIMEOUT_S)
    with contextlib.closing(again):
        try:
            s3.wait_for_held_request()
            body = json.dumps({"input": given})
            again.request("PUT", "/predictions/left", body, {"Content-Type": "application/json"})
            # What is answered after it was sent was asked while it waited.
            for _ in range(10):
                assert gateway.get("/predictions/left").json()["status"] == "processing"
        finally:
            s3.clear_faults()
        assert gateway.get("/live").is_success
        response = again.getresponse()
        answer = json.loads(response.read())
    assert response.status == HTTPStatus.OK
    assert answer["status"] == "succeeded"
    assert journal.read_text().splitlines() == ["left", "left"]


def test_a_caller_who_leaves_a_prediction_to_others_does_not_take_it_from_them(
    gateway: GatewayServer, journal: Path
) -> None:
    given = {"prompt": "shared", "seconds": 1.5}
    with ThreadPoolExecutor(1) as callers:
        first = callers.submit(gateway.put, "shared", given)
        gateway.until(
            lambda: gateway.get("/predictions/shared").json().get("status") == "processing"
        )
        with asked(gateway, "shared", given):
            pass
        assert first.result(TIMEOUT_S).json()["status"] == "succeeded"
    assert journal.read_text().splitlines() == ["shared"]


def test_what_nobody_waits_for_any_more_frees_its_slot(gateway: GatewayServer) -> None:
    for name in ("one", "two", "three"):
        with asked(gateway, name, {"prompt": name, "seconds": 60}):
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
