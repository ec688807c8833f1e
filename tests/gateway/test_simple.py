"""`/predict` answers with the image itself, and with a status that says whether there is one."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.s3 import EmbeddedS3
from tests.support.gateway_server import GatewayServer, holding

BUCKET = "simple-images"
JSON = {"Content-Type": "application/json"}
FOXES = {"prompt": "fox", "num_outputs": 2, "seed": 5}


@pytest.fixture(scope="module")
def environment(s3: EmbeddedS3) -> dict[str, str]:
    s3.create_bucket(BUCKET)
    return {**s3.environment(), "PUBLIC_BUCKET_NAME": BUCKET, "STORE_IMAGES": "1"}


@pytest.fixture(scope="module")
def gateway(environment: dict[str, str], runner_folder: Path) -> Iterator[GatewayServer]:
    with GatewayServer(environment, runner_folder) as running:
        yield running


def decoded(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image, validate=True)))


@pytest.mark.parametrize(
    "body",
    [FOXES, {"input": FOXES}],
    ids=["flat", "as Cog has it"],
)
def test_a_prompt_gives_images(gateway: GatewayServer, body: dict[str, Any]) -> None:
    answer = gateway.post("/predict", json=body)

    assert answer.status_code == 200
    told = answer.json()
    assert told["image"] == told["images"][0]
    assert [decoded(image).format for image in told["images"]] == ["PNG", "PNG"]
    assert told["content_type"] == "image/png"
    assert told["seed"] == 5
    assert "denoise" in told["timings"]
    recorded = gateway.get(f"/predictions/{told['id']}").json()
    assert (recorded["status"], len(recorded["output"])) == ("succeeded", 2)


def test_images_behind_a_public_address_are_read_from_the_bucket(
    environment: dict[str, str], runner_folder: Path
) -> None:
    """Nothing serves that address: the gateway does not need it."""
    public = environment | {"PUBLIC_BASE_URL": "https://images.example/public"}
    with GatewayServer(public, runner_folder) as gateway:
        told = gateway.post("/predict", json={"prompt": "fox"}).json()

        assert decoded(told["image"]).size == (1, 1)
        (url,) = gateway.get(f"/predictions/{told['id']}").json()["output"]
        assert url.startswith("https://images.example/public/")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"prompt": "fox", "seed": -1}, 422),
        ([], 422),
        ({"input": "fox"}, 422),
        ("a fox", 422),
        ({"prompt": "fox", "num_outputs": "\ud800"}, 422),
        ({"prompt": functools.reduce(lambda inner, _: [inner], range(300), "fox")}, 422),
    ],
    ids=["nothing", "negative", "list", "no object", "text", "half a character", "deep"],
)
def test_a_wrong_body_is_refused(gateway: GatewayServer, body: Any, status: int) -> None:
    answer = gateway.post("/predict", content=json.dumps(body), headers=JSON)

    assert answer.status_code == status
    assert answer.json()["detail"]


def test_a_body_that_is_no_json_is_refused(gateway: GatewayServer) -> None:
    assert gateway.post("/predict", content=b"a fox", headers=JSON).status_code == 400


def test_a_failed_prediction_is_an_error_with_its_words(gateway: GatewayServer) -> None:
    answer = gateway.post("/predict", json={"prompt": "fail"})

    assert answer.status_code == 500
    assert "cannot do that" in answer.json()["detail"]
    assert gateway.get(f"/predictions/{answer.json()['id']}").json()["status"] == "failed"


def test_who_hangs_up_is_no_fault_of_the_server(gateway: GatewayServer) -> None:
    body = json.dumps({"prompt": "left"})
    with holding(gateway.cwd, "left"):
        with contextlib.closing(HTTPConnection("127.0.0.1", gateway.port)) as caller:
            caller.request("POST", "/predict", body, JSON)
            gateway.until(lambda: "running left" in gateway.logs)
        gateway.until(lambda: 'route="/predict",status="499"} 1.0' in gateway.get("/metrics").text)


def test_output_that_is_no_image_of_the_bucket_is_not_fetched(
    s3: EmbeddedS3, environment: dict[str, str], runner_folder: Path
) -> None:
    """Whatever a model puts out: the gateway reads its own bucket and follows no URL."""
    without = {name: value for name, value in environment.items() if name != "STORE_IMAGES"}
    with GatewayServer(without, runner_folder) as gateway:
        answer = gateway.post("/predict", json={"prompt": "fox"})

        assert answer.status_code == 502
        prediction_id = answer.json()["detail"].rpartition("/predictions/")[2].split()[0]
        assert gateway.get(f"/predictions/{prediction_id}").json()["status"] == "succeeded"
        assert "images.example/fox-0.png is no image of bucket" in gateway.logs
