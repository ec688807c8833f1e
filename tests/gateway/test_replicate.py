"""Replicate's Python client, as it is, before this server: only where it calls is changed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from replicate import Client
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction
from replicate.webhook import Webhooks, WebhookSigningSecret

from demo.s3 import EmbeddedS3
from gateway.keys import digest_of, new_key
from tests.support.asgi import HOST, serving
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import TIMEOUT_S, GatewayServer

KEY = new_key()
MODEL, OTHER_MODEL = "test/runner", "test/other"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
FOX = {"prompt": "fox"}
FOX_URL = "https://images.example/fox-0.png"
# Longer than any test: it ends because somebody cancels it.
FOR_EVER = {"prompt": "fox", "seconds": 60}


@pytest.fixture(scope="module")
def gateway(s3: EmbeddedS3, runner_folder: Path) -> Iterator[GatewayServer]:
    s3.create_bucket("replicate-images")
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": "replicate-images",
        "API_KEYS": f"alice:{digest_of(KEY)}",
        "ALLOW_PRIVATE_HOSTS": HOST,
        "WEBHOOK_SIGNING_SECRET": SECRET,
        "MODEL_PATH": f"{MODEL},{OTHER_MODEL}",
    }
    with GatewayServer(environment, runner_folder) as running:
        yield running


def client_of(gateway: GatewayServer, key: str = KEY) -> Client:
    client = Client(api_token=key, base_url=gateway.url, timeout=httpx.Timeout(TIMEOUT_S))
    client.poll_interval = 0.02
    return client


@pytest.fixture
def client(gateway: GatewayServer) -> Client:
    return client_of(gateway)


def test_a_prediction_is_created_polled_and_finished(client: Client) -> None:
    prediction = client.predictions.create(version=MODEL, input={**FOX, "seed": 3})

    assert prediction.status == "starting"
    assert len(prediction.id) == 26
    assert prediction.id.isalnum()
    assert prediction.id == prediction.id.lower()

    prediction.wait()

    assert prediction.status == "succeeded"
    assert prediction.output == [FOX_URL]
    assert prediction.metrics is not None
    assert prediction.metrics["seed"] == 3
    assert prediction.metrics["total_time"] > 0
    assert prediction.completed_at is not None
    assert prediction.error is None
    assert prediction.model == MODEL


def test_a_create_that_waits_has_the_end(client: Client) -> None:
    prediction = client.predictions.create(model=MODEL, input=FOX)
    waited = client.predictions.create(version=MODEL, input=FOX, wait=True)

    assert prediction.status == "starting"
    assert (waited.status, waited.output) == ("succeeded", [FOX_URL])


def test_a_create_that_has_waited_long_enough_says_that_it_is_to_be_polled(client: Client) -> None:
    """The clients go on to poll only where it is `starting`, and take anything else for the end."""
    prediction = client.predictions.create(version=MODEL, input=FOR_EVER, wait=1)

    assert prediction.status == "starting"
    assert prediction.output is None
    prediction.cancel()
    assert prediction.status == "canceled"


@pytest.mark.parametrize("wait", ["²", "-1", "9" * 5000])
def test_a_wait_that_is_no_number_is_as_long_as_may_be(gateway: GatewayServer, wait: str) -> None:
    made = gateway.post(
        "/v1/predictions",
        json={"input": FOX},
        headers={"Authorization": f"Bearer {KEY}", "Prefer": f"wait={wait}".encode("latin-1")},
    )
    assert made.status_code == 201
    assert made.json()["status"] == "succeeded"


def test_run_returns_the_output(client: Client) -> None:
    output = client.run(MODEL, input={**FOX, "num_outputs": 2})

    assert [file.url for file in output] == [FOX_URL, "https://images.example/fox-1.png"]


def test_run_raises_what_the_model_says(client: Client) -> None:
    with pytest.raises(ModelError, match="cannot do that"):
        client.run(MODEL, input={"prompt": "fail"})


def test_the_model_of_the_url_is_the_one_that_is_run(client: Client) -> None:
    prediction = client.models.predictions.create(OTHER_MODEL, input=FOX, wait=True)

    assert prediction.model == OTHER_MODEL
    assert prediction.input == {**FOX, "model": OTHER_MODEL}


def test_a_model_that_is_not_here_is_not_found(client: Client) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.run("stability-ai/sdxl", input=FOX)

    assert refused.value.status == 404
    assert refused.value.title == "Not Found"
    assert MODEL in str(refused.value.detail)


def test_a_version_that_is_not_here_is_refused(client: Client) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.predictions.create(version="6f7a773af6fc3e8de9d5a3c00be77c17", input=FOX)

    assert refused.value.status == 422
    assert MODEL in str(refused.value.detail)


def test_a_wrong_input_is_named(client: Client, gateway: GatewayServer) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.predictions.create(version=MODEL, input={"prompt": "fox", "seed": -1})

    assert refused.value.status == 422
    assert refused.value.title == "Input validation failed"
    assert "input.seed" in str(refused.value.detail)


def test_a_running_prediction_is_cancelled(client: Client) -> None:
    prediction = client.predictions.create(version=MODEL, input=FOR_EVER)

    prediction.cancel()

    assert prediction.status == "canceled"
    assert client.predictions.get(prediction.id).status == "canceled"


def test_one_that_is_not_there_is_not_found(client: Client) -> None:
    for ask in (client.predictions.get, client.predictions.cancel):
        with pytest.raises(ReplicateError) as refused:
            ask("nothing-of-the-kind")
        assert refused.value.status == 404


def test_all_predictions_are_listed_page_by_page_newest_first(
    client: Client, gateway: GatewayServer
) -> None:
    made = [client.predictions.create(version=MODEL, input=FOX, wait=True).id for _ in range(22)]

    first = client.predictions.list()
    assert first.next is not None
    assert first.next.startswith(f"{gateway.url}/v1/predictions?cursor=")
    second = client.predictions.list(cursor=first.next)

    listed = [prediction.id for page in (first, second) for prediction in page]
    assert listed[:22] == made[::-1]


def test_a_cursor_that_no_page_gave_is_refused(client: Client) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.predictions.list(cursor="/v1/predictions?cursor=yesterday")

    assert refused.value.status == 422


def test_the_output_is_streamed(client: Client) -> None:
    events = list(client.stream(MODEL, input={**FOX, "num_outputs": 2}))

    assert [event.event.value for event in events] == ["output", "output", "done"]
    assert [str(event.data) for event in events[:2]] == [
        FOX_URL,
        "https://images.example/fox-1.png",
    ]


def test_a_stream_of_a_finished_prediction_has_its_output(client: Client) -> None:
    prediction = client.predictions.create(version=MODEL, input=FOX, wait=True)

    assert [event.event.value for event in prediction.stream()] == ["output", "done"]


def test_a_stream_ends_with_the_error_of_a_failed_prediction(client: Client) -> None:
    with pytest.raises(RuntimeError, match="cannot do that"):
        list(client.stream(MODEL, input={"prompt": "fail"}))


def test_a_stream_needs_the_key_or_the_seal_of_its_url(
    client: Client, gateway: GatewayServer
) -> None:
    prediction = client.predictions.create(version=MODEL, input=FOX, wait=True)
    assert prediction.urls is not None
    sealed = prediction.urls["stream"].removeprefix(gateway.url)
    bare = sealed.partition("?")[0]
    other = client.predictions.create(version=MODEL, input=FOX, wait=True)

    assert gateway.get(sealed).status_code == 200
    assert gateway.get(bare).status_code == 401
    assert gateway.get(f"{bare}?seal=é").status_code == 401
    assert gateway.get(sealed.replace(prediction.id, other.id)).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "Token"])
def test_both_ways_to_send_a_key_are_taken(gateway: GatewayServer, scheme: str) -> None:
    answer = gateway.get("/v1/account", headers={"Authorization": f"{scheme} {KEY}"})

    assert answer.json()["username"] == "alice"


def test_a_wrong_key_is_refused_in_replicates_form(gateway: GatewayServer) -> None:
    with pytest.raises(ReplicateError) as refused:
        client_of(gateway, "r8_wrong").predictions.list()

    assert (refused.value.status, refused.value.title) == (401, "Unauthenticated")


def test_models_are_told(client: Client) -> None:
    model = client.models.get(OTHER_MODEL)

    assert model.id == OTHER_MODEL
    assert client.accounts.current().username == "alice"
    with pytest.raises(ReplicateError):
        client.models.get("nobody/nothing")


def test_webhooks_tell_of_the_end(client: Client) -> None:
    arrived: list[httpx.Request] = []
    told = threading.Event()

    async def receiver(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (part := await receive()).get("more_body"):
            body += part["body"]
        arrived.append(
            httpx.Request("POST", "/hook", headers=scope["headers"], content=body + part["body"])
        )
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        told.set()

    with serving(receiver) as port:
        prediction = client.predictions.create(
            version=MODEL,
            input=FOX,
            webhook=f"http://{HOST}:{port}/hook",
            webhook_events_filter=["completed"],
        )
        assert told.wait(TIMEOUT_S)

    (request,) = arrived
    Webhooks.validate(request, secret=WebhookSigningSecret(key=SECRET))
    told_of = json.loads(request.content)
    assert (told_of["id"], told_of["status"]) == (prediction.id, "succeeded")
    assert told_of["output"] == [FOX_URL]


def test_the_page_s_python_works_as_it_stands(gateway: GatewayServer) -> None:
    page = (REPOSITORY / "docs" / "replicate.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for written, here in [
        ("http://ip:port", gateway.url),
        ("YOUR_KEY", KEY),
        ("ByteDance/SDXL-Lightning", MODEL),
    ]:
        assert written in program
        program = program.replace(written, here)

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    urls, prediction = done.stdout.splitlines()
    assert urls.count("https://images.example/") == 2
    assert prediction.startswith("succeeded ['https://images.example/a fox-0.png']")


def test_a_webhook_into_a_private_network_is_refused(client: Client) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.predictions.create(
            version=MODEL, input=FOX, webhook="http://169.254.169.254/latest/meta-data"
        )

    assert refused.value.status == 422


def test_all_of_it_works_without_blocking(gateway: GatewayServer) -> None:
    async def use() -> tuple[Prediction, Prediction, Any, list[str]]:
        client = client_of(gateway)
        created = await client.predictions.async_create(version=MODEL, input=FOX)
        await created.async_wait()
        endless = await client.predictions.async_create(version=MODEL, input=FOR_EVER)
        await endless.async_cancel()
        output = await client.async_run(MODEL, input=FOX)
        page = await client.predictions.async_list()
        return created, endless, output, [prediction.id for prediction in page]

    created, endless, output, listed = asyncio.run(use())

    assert created.output == [FOX_URL]
    assert endless.status == "canceled"
    assert [file.url for file in output] == [FOX_URL]
    assert {created.id, endless.id} <= set(listed)


def test_a_prediction_goes_on_when_its_caller_has_left(
    client: Client, gateway: GatewayServer
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{gateway.url}/v1/predictions",
            json={"version": MODEL, "input": {"prompt": "left alone", "seconds": 0.5}},
            headers={"Authorization": f"Bearer {KEY}", "Prefer": "wait"},
            timeout=httpx.Timeout(TIMEOUT_S, read=0.2),
            trust_env=False,
        )

    def is_done() -> bool:
        return any(
            prediction.input == {"prompt": "left alone", "seconds": 0.5, "model": MODEL}
            and prediction.status == "succeeded"
            for prediction in client.predictions.list()
        )

    gateway.until(is_done)


def test_a_create_that_waits_is_accepted_though_the_server_stops(
    gateway: GatewayServer, runner_folder: Path
) -> None:
    """It is recorded, and the next gateway makes it: an error would have the caller ask for a second one."""
    same = {name: value for name, value in gateway.environment.items() if name != "PORT"}
    with (
        GatewayServer(same | {"SHUTDOWN_GRACE_SECONDS": "0"}, runner_folder) as stopping,
        ThreadPoolExecutor() as pool,
    ):
        client = client_of(stopping)
        waiting = pool.submit(client.predictions.create, version=MODEL, input=FOR_EVER, wait=True)
        stopping.until(lambda: client.predictions.list()[0].status == "processing")
        stopping.terminate()
        prediction = waiting.result(TIMEOUT_S)

    assert prediction.status == "starting"
    found = client_of(gateway).predictions.get(prediction.id)
    assert found.status in ("starting", "processing")
    found.cancel()


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({"Host": "images.example:8443"}, "http://images.example:8443"),
        (
            {
                "Host": "10.0.0.7:5000",
                "X-Forwarded-Proto": "https",
                "X-Forwarded-Host": "a.example",
            },
            "https://a.example",
        ),
        (
            {"Host": "a.example", "X-Forwarded-Proto": "https, http"},
            "https://a.example",
        ),
        ({"Host": "a.example", "X-Forwarded-Proto": "javascript"}, "http://a.example"),
        ({"Host": "a.example", "X-Forwarded-Host": 'b.example/"<'}, None),
    ],
)
def test_urls_are_those_that_the_caller_can_reach(
    gateway: GatewayServer, headers: dict[str, str], base: str | None
) -> None:
    answer = gateway.post(
        "/v1/predictions",
        json={"version": MODEL, "input": FOX},
        headers={"Authorization": f"Bearer {KEY}", **headers},
    )

    assert answer.status_code == 201
    prediction = answer.json()
    here = f"{base or gateway.url}/v1/predictions/{prediction['id']}"
    assert prediction["urls"]["get"] == here
    assert prediction["urls"]["cancel"] == f"{here}/cancel"
    assert prediction["urls"]["stream"].startswith(f"{here}/stream?seal=")
