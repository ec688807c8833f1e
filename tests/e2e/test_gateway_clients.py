"""The whole product behind its door: the small SDXL, asked by /predict and by Replicate's client."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from replicate import Client
from replicate.exceptions import ReplicateError

from gateway.keys import digest_of, new_key
from tests.e2e.conftest import MODEL, TUTORIAL_INPUT, Deployment, fetch, version_of
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import TIMEOUT_S, GatewayServer

KEY = new_key()
# One thread gives the same pixels each time.
FOX = {**TUTORIAL_INPUT, "prompt": "a fox", "seed": 11}


@pytest.fixture(scope="module")
def gateway(deployment: Deployment) -> Iterator[GatewayServer]:
    environment = deployment.environment(API_KEYS=f"alice:{digest_of(KEY)}")
    with GatewayServer(environment, REPOSITORY) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayServer) -> Client:
    client = Client(api_token=KEY, base_url=gateway.url, timeout=httpx.Timeout(TIMEOUT_S))
    client.poll_interval = 0.05
    return client


def test_predict_answers_with_the_images_that_lie_in_the_bucket(
    gateway: GatewayServer, deployment: Deployment
) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = gateway.post("/predict", json={**FOX, "num_outputs": 2}, headers=headers)

    assert answer.status_code == 200, answer.text
    told = answer.json()
    images = [base64.b64decode(image) for image in told["images"]]
    assert [Image.open(io.BytesIO(image)).size for image in images] == [(256, 256)] * 2
    assert told["seed"] == 11
    assert told["model_version"] == version_of(deployment)
    recorded = gateway.get(f"/predictions/{told['id']}", headers=headers).json()
    assert [fetch(url) for url in recorded["output"]] == images


def test_what_the_model_cannot_do_is_said_in_its_words(gateway: GatewayServer) -> None:
    answer = gateway.post(
        "/predict",
        json={**FOX, "num_inference_steps": 3},
        headers={"Authorization": f"Bearer {KEY}"},
    )

    assert answer.status_code == 500
    assert "steps" in answer.json()["detail"]


def test_replicates_client_runs_the_published_version(
    client: Client, deployment: Deployment
) -> None:
    """The version's document says that the output is an iterator's, so the client gives one, as for Replicate's own."""
    version = version_of(deployment)

    output = client.run(f"{MODEL}:{version}", input=FOX)

    (url,) = [str(file) for file in output]
    assert Image.open(io.BytesIO(fetch(url))).size == (256, 256)


def test_replicates_client_learns_what_the_model_takes(
    client: Client, deployment: Deployment
) -> None:
    model = client.models.get(MODEL)
    (version,) = model.versions.list()

    assert model.latest_version is not None
    assert version.id == model.latest_version.id == version_of(deployment)
    inputs = version.openapi_schema["components"]["schemas"]["Input"]["properties"]
    assert "prompt" in inputs
    assert model.versions.get(version.id).cog_version == version.cog_version
    with pytest.raises(ReplicateError):
        model.versions.get("0" * 64)


def test_a_prediction_tells_the_version_that_made_it(
    client: Client, deployment: Deployment
) -> None:
    prediction = client.predictions.create(version=version_of(deployment), input=FOX)
    assert (prediction.model, prediction.version) == (MODEL, version_of(deployment))

    prediction.wait()

    assert prediction.status == "succeeded"
    assert prediction.version == version_of(deployment)
