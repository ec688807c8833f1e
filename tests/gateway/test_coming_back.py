"""Who comes back for a prediction at the worst moment gets it, and the gateway goes on."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from tests.support.gateway_server import TIMEOUT_S, GatewayServer


def test_who_comes_back_while_their_leaving_is_being_recorded_gets_it_after_all(
    s3: EmbeddedS3, gateway_environment: dict[str, str], runner_folder: Path
) -> None:
    given = {"prompt": "again", "seconds": 0.5}
    record = Fault(
        kind="hold",
        method="PUT",
        bucket=gateway_environment["PUBLIC_BUCKET_NAME"],
        key="predictions/again.json",
        skip=1,  # the claim
        times=1,
    )
    with GatewayServer(gateway_environment, runner_folder) as gateway:
        with s3.fault(record):
            with pytest.raises(httpx.ReadTimeout):
                httpx.put(
                    f"{gateway.url}/predictions/again",
                    json={"input": given},
                    timeout=0.3,
                    trust_env=False,
                )
            s3.wait_for_held_request()
            back = [asked_again(gateway, "again", given) for _ in range(2)]
            # Whoever asks after them is answered after they were heard.
            for _ in back:
                assert gateway.get("/live").is_success
        answers = [json.loads(one.getresponse().read()) for one in back]

        assert {answer["status"] for answer in answers} <= {"starting", "processing", "succeeded"}
        gateway.until(lambda: gateway.get("/predictions/again").json()["status"] == "succeeded")


def asked_again(
    gateway: GatewayServer, prediction_id: str, given: dict[str, Any]
) -> http.client.HTTPConnection:
    """A request that was sent, and whose answer nobody has waited for yet."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=TIMEOUT_S)
    body = json.dumps({"input": given})
    headers = {"Content-Type": "application/json"}
    connection.request("PUT", f"/predictions/{prediction_id}", body, headers)
    return connection
