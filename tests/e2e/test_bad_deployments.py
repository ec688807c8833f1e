"""What the person who deploys can get wrong: setup fails, says which object and what to try, and shows no secret."""

from __future__ import annotations

import json

import pytest

from demo.s3_faults import Fault
from tests.e2e.conftest import MODEL, TUTORIAL_INPUT, fetch, image_urls, version_of
from tests.support.cog_server import CogServer
from weights import find_snapshot

UNET = "unet/diffusion_pytorch_model.safetensors"


def failed_setup(environment: dict[str, str]) -> str:
    """Start a server that must fail, and return the message /health-check shows."""
    with CogServer(environment) as server:
        health = server.health()
        assert health["status"] == "SETUP_FAILED", server.tail()
        assert server.predict(TUTORIAL_INPUT).status == 503
        shown = health["setup"]["logs"] + server.logs
    assert environment.get("AWS_SECRET_ACCESS_KEY", "no secret") not in shown
    assert "Traceback" not in shown
    message: str = health["setup"]["logs"]
    return message


@pytest.mark.parametrize("name", ["MODEL_PATH", "MODEL_BUCKET_NAME", "PUBLIC_BUCKET_NAME"])
def test_a_missing_variable_is_named(deployment, name):
    environment = deployment.environment()
    del environment[name]
    message = failed_setup(environment)
    assert f"{name} is missing" in message
    assert f"Example: {name}=" in message


def test_a_wrong_secret_is_named_and_not_shown(deployment):
    message = failed_setup(deployment.environment(AWS_SECRET_ACCESS_KEY="tsec_hunter2"))
    assert "SecretAccessKey" not in message
    assert "the secret access key does not belong to the access key ID" in message
    assert f"s3://{deployment.models}/{MODEL}/latest.json" in message


def test_a_wrong_key_id_is_named(deployment):
    message = failed_setup(deployment.environment(AWS_ACCESS_KEY_ID="AKIAWRONG"))
    assert "the access key ID is not known" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_a_wrong_bucket_is_named(deployment):
    message = failed_setup(deployment.environment(MODEL_BUCKET_NAME="no-such-bucket"))
    assert "no-such-bucket" in message
    assert "MODEL_BUCKET_NAME" in message


def test_a_wrong_model_path_is_named(deployment):
    message = failed_setup(deployment.environment(MODEL_PATH="No/Such"))
    for part in ("No/Such", deployment.models, "MODEL_PATH"):
        assert part in message


def test_an_unreachable_server_is_named(deployment):
    message = failed_setup(deployment.environment(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9"))
    assert "the server could not be reached" in message
    assert "AWS_ENDPOINT_URL_S3" in message


def test_a_version_that_is_not_there_is_named(deployment):
    message = failed_setup(deployment.environment(MODEL_VERSION="0" * 32))
    assert f"version {'0' * 32} of {MODEL}" in message


def test_a_manifest_that_names_etc_passwd_is_refused(own_deployment):
    bucket = own_deployment.bucket(own_deployment.models)
    key = f"{MODEL}/{version_of(own_deployment)}/manifest.json"
    manifest = json.loads(bucket.get(key, limit=10**7))
    manifest["files"][0]["path"] = "../../etc/passwd"
    bucket.put(key, json.dumps(manifest).encode(), content_type="application/json")

    message = failed_setup(own_deployment.environment())

    assert f"s3://{own_deployment.models}/{key} is refused" in message
    assert "'../../etc/passwd' is not a plain path" in message


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_weight_file_is_named(own_deployment, damage):
    bucket = own_deployment.bucket(own_deployment.models)
    snapshot = find_snapshot(bucket, MODEL)
    unet = next(
        file for file in snapshot.files if file.path.startswith("unet/") and file.is_weights
    )
    data = bytearray(bucket.client.get_object(Bucket=bucket.name, Key=unet.key)["Body"].read())
    if damage == "gone":
        bucket.client.delete_object(Bucket=bucket.name, Key=unet.key)
    else:
        data[-100] ^= 0x10
        data = data[: len(data) // 2] if damage == "truncated" else data
        bucket.client.put_object(Bucket=bucket.name, Key=unet.key, Body=bytes(data))

    message = failed_setup(own_deployment.environment())

    assert unet.key in message
    expected = {
        "flipped": "are not the bytes that were published",
        "truncated": "it was truncated or replaced",
        "gone": "there is no such object",
    }
    assert expected[damage] in message


def test_an_image_bucket_that_refuses_fails_that_request_and_the_next_one_is_served(
    deployment, server
):
    refusing = Fault(kind="status", status=403, method="PUT", bucket=deployment.images)
    with deployment.s3.fault(refusing):
        response = server.predict(TUTORIAL_INPUT | {"num_outputs": 2})
    assert response.status == 200
    assert response.body["status"] == "failed"
    assert "output" not in response.body
    assert f"could not be stored as s3://{deployment.images}/" in response.body["error"]
    assert "To make it again, send seed" in response.body["error"]

    image_urls(server.predict(TUTORIAL_INPUT))


def test_when_one_image_of_several_fails_the_error_tells_where_the_others_are(deployment, server):
    refusing = Fault(kind="status", status=403, method="PUT", bucket=deployment.images, times=1)
    with deployment.s3.fault(refusing):
        response = server.predict(TUTORIAL_INPUT | {"num_outputs": 2})
    error = response.body["error"]
    stored = error.partition("The other images are stored: ")[2]
    assert fetch(stored)


def test_an_image_bucket_that_is_not_there_fails_requests_by_name(deployment):
    with CogServer(deployment.environment(PUBLIC_BUCKET_NAME="no-such-images")) as running:
        response = running.predict(TUTORIAL_INPUT)
        assert response.body["status"] == "failed"
        assert "s3://no-such-images/" in response.body["error"]
        assert running.health()["status"] == "READY"


def test_a_busy_image_bucket_is_tried_again(deployment, server):
    busy = Fault(kind="status", status=503, method="PUT", bucket=deployment.images, times=2)
    with deployment.s3.fault(busy):
        (url,) = image_urls(server.predict(TUTORIAL_INPUT))
    assert fetch(url)


def test_a_bare_folder_as_older_templates_uploaded_it_serves(
    s3, deployment, small_sdxl, new_bucket
):
    bucket = deployment.bucket(new_bucket())
    for file in small_sdxl.rglob("*"):
        if file.is_file() and file.name != "recipe.json":
            key = f"{MODEL}/{file.relative_to(small_sdxl).as_posix()}"
            bucket.client.upload_file(str(file), bucket.name, key)
    environment = deployment.environment(MODEL_BUCKET_NAME=bucket.name) | s3.environment()

    with CogServer(environment) as running:
        assert running.health()["status"] == "READY", running.tail()
        assert "carries no digests" in running.logs
        (url,) = image_urls(running.predict({"prompt": "a fox", "num_inference_steps": 2}))
        assert fetch(url)
