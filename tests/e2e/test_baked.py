"""A model baked into the image, as docs/baking.md says, is served without its bucket, and newer ones are told of."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from demo.s3_faults import Fault
from demo.small_sdxl import write_small_sdxl
from loading import load
from settings import load_runner_settings
from tests.e2e.conftest import MODEL, Deployment, fetch, image_urls, version_of
from tests.e2e.test_refresh import publish
from tests.support.cog_server import REPOSITORY, CogServer, Response
from weights import find_snapshot
from weights.waterfall import JSON_NAME, SVG_NAME, ColdStart

REQUEST = {"prompt": "a lighthouse", "seed": 7}
PAGE = (REPOSITORY / "docs" / "baking.md").read_text(encoding="utf-8")
# What a server needs of the checkout: with the packages it is what Cog puts into /src.
CODE = [
    "predict.py",
    "loading.py",
    "checks.py",
    "compiling.py",
    "events.py",
    "settings.py",
    "s3",
    "weights",
    "diffusion",
    "images",
    ".cog",
]


@pytest.fixture(scope="module")
def image(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The /src of an image that was built as the page's Dockerfile says; read only. A shell stands in for Docker."""
    folder = tmp_path_factory.mktemp("image") / "src"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "tmp")
    for name in CODE:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder)
    [command] = re.findall(r"^RUN --mount=\S+ \\\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    secret = folder.parent / "runner.env"
    variables = deployment.s3.environment(deployment.workload)
    variables["MODEL_BUCKET_NAME"] = deployment.models
    secret.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    written = {"/run/secrets/bucket": shlex.quote(str(secret)), "ByteDance/SDXL-Lightning": MODEL}
    for words, meant in written.items():
        assert words in command
        command = command.replace(words, meant)
    subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "VERSION": version_of(deployment),
        },
        check=True,
        capture_output=True,
        text=True,
    )
    return folder


@pytest.fixture(scope="module")
def from_the_bucket(server: CogServer) -> np.ndarray:
    """The picture that a server makes whose weights came from the bucket."""
    return pixels(server.predict(REQUEST))


def pixels(response: Response) -> np.ndarray:
    (url,) = image_urls(response)
    return np.asarray(Image.open(io.BytesIO(fetch(url))).convert("RGB"))


def images_alone(deployment: Deployment) -> dict[str, str]:
    """An environment whose keypair may store images, and do nothing in the bucket of models."""
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject"],
                "Resource": f"arn:aws:s3:::{deployment.images}/*",
            }
        ],
    }
    keypair = deployment.s3.create_user(f"images-alone-{deployment.images}", policy)
    return deployment.environment(**deployment.s3.environment(keypair))


def version_of_folder(folder: Path) -> str:
    version: str = json.loads((folder / "manifest.json").read_text())["version"]
    return version


def asked_for(deployment: Deployment) -> list[tuple[str, int]]:
    """What the bucket of models was asked for, by path, and what it answered."""
    records = deployment.s3.requests(deployment.models)
    return [(record.key.removeprefix(f"{MODEL}/"), record.status) for record in records]


def test_a_baked_model_serves_although_its_bucket_refuses(
    own_deployment, image, from_the_bucket, tmp_path
):
    environment = images_alone(own_deployment) | {"COLD_START_DIR": str(tmp_path)}
    own_deployment.s3.forget_requests()
    with CogServer(environment, cwd=image) as server:
        health = server.health()
        assert health["status"] == "READY", server.tail()
        picture = pixels(server.predict(REQUEST))
        server.wait_for_log("which may not be the published one any more: cannot read")
    record = json.loads((tmp_path / JSON_NAME).read_text())

    np.testing.assert_array_equal(picture, from_the_bucket)
    assert asked_for(own_deployment) == [("latest.json", 403)]
    folder = str(image / "model")
    version = version_of(own_deployment)
    assert re.search(
        rf"loading {MODEL} {version}, .* GB, from {re.escape(folder)}\n", health["setup"]["logs"]
    )
    [phase] = [phase for phase in record["phases"] if phase["name"] == "bytes"]
    assert phase["source"] == folder
    counters = record["counters"]
    assert counters["folder_bytes"] == counters["landed_bytes"] == phase["bytes"] > 1_000_000
    assert counters["network_bytes"] == counters["requests"] == 0
    assert f"{counters['folder_bytes']:,} folder_bytes" in (tmp_path / SVG_NAME).read_text()


def test_a_baked_model_needs_no_bucket_at_all(own_deployment, image, from_the_bucket):
    environment = images_alone(own_deployment)
    del environment["MODEL_BUCKET_NAME"]
    own_deployment.s3.forget_requests()
    # A process of its own reads as it does for a card.
    with CogServer(environment | {"MODEL_READER": "process"}, cwd=image) as server:
        np.testing.assert_array_equal(pixels(server.predict(REQUEST)), from_the_bucket)
    assert asked_for(own_deployment) == []


def test_a_baked_model_is_ready_although_the_server_is_out_of_reach(deployment, image):
    environment = deployment.environment(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    with CogServer(environment, cwd=image) as server:
        assert server.health()["status"] == "READY", server.tail()
        server.wait_for_log("which may not be the published one any more: cannot read")
        assert server.logs.count("could not be reached") == 1


def test_nobody_waits_for_an_answer_about_newer_versions(own_deployment, image, caplog):
    environment = own_deployment.environment(MODEL_FOLDER=str(image / "model"), DEVICE="cpu")
    held = Fault(kind="hold", bucket=own_deployment.models, key="*/latest.json")
    with own_deployment.s3.fault(held):
        engine = load(load_runner_settings(environment), ColdStart(), meanwhile=lambda: None)
        own_deployment.s3.wait_for_held_request()
        [asking] = [thread for thread in threading.enumerate() if thread.name == "latest"]
        assert engine.version == version_of_folder(image / "model")
        assert "serving version" not in caplog.text
    asking.join()


def test_a_pinned_version_that_is_baked_in_asks_the_bucket_for_nothing(own_deployment, image):
    environment = own_deployment.environment(MODEL_VERSION=version_of(own_deployment))
    own_deployment.s3.forget_requests()
    with CogServer(environment, cwd=image) as server:
        assert server.health()["status"] == "READY", server.tail()
        pixels(server.predict(REQUEST))
    assert asked_for(own_deployment) == []


@pytest.fixture
def republished(own_deployment: Deployment, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose bucket has another version than the image."""
    publish(own_deployment, write_small_sdxl(tmp_path / "other" / "model", seed=1))
    own_deployment.s3.forget_requests()
    return own_deployment


def test_a_newer_version_in_the_bucket_is_told_of_and_the_baked_one_serves(
    deployment, republished, image, from_the_bucket
):
    baked, newer = version_of(deployment), version_of(republished)
    republished.s3.forget_requests()
    with CogServer(republished.environment(), cwd=image) as server:
        server.wait_for_log(f"serving version {baked} from {image / 'model'}, while s3://")
        [line] = [line for line in server.logs.splitlines() if "serving version" in line]
        response = server.predict(REQUEST)

    assert f"{republished.models}/{MODEL}/latest.json names version {newer}. " in line
    for remedy in ("build the image anew", "MODEL_VERSION", "MODEL_REFRESH_SECONDS"):
        assert remedy in line
    assert response.body["metrics"]["model_version"] == baked
    np.testing.assert_array_equal(pixels(response), from_the_bucket)
    assert asked_for(republished) == [("latest.json", 200)]


@pytest.mark.slow
def test_a_server_that_refreshes_takes_the_newer_version_over_from_the_bucket(
    deployment, republished, image, from_the_bucket
):
    baked, newer = version_of(deployment), version_of(republished)
    with CogServer(republished.environment(MODEL_REFRESH_SECONDS="1"), cwd=image) as server:
        server.wait_for_log("MODEL_REFRESH_SECONDS will have it taken over")
        server.wait_for_log(f"Version {newer} took over from {baked}")
        response = server.predict(REQUEST)
    assert response.body["metrics"]["model_version"] == newer
    assert (pixels(response) != from_the_bucket).any()


def test_another_version_than_the_baked_one_is_read_from_the_bucket_when_it_is_pinned(
    deployment, republished, image
):
    newer = version_of(republished)
    with CogServer(republished.environment(MODEL_VERSION=newer), cwd=image) as server:
        response = server.predict(REQUEST)
        health = server.health()
    assert response.body["metrics"]["model_version"] == newer
    assert (
        f"reading s3://{republished.models}/{MODEL}, since {image / 'model'} holds version "
        f"{version_of(deployment)}, and MODEL_VERSION is {newer}" in health["setup"]["logs"]
    )


def test_a_folder_elsewhere_is_named_and_one_that_is_not_whole_is_left_alone(
    deployment, image, tmp_path, from_the_bucket
):
    folder = shutil.copytree(image / "model", tmp_path / "model")
    environment = deployment.environment(MODEL_FOLDER=str(folder))
    with CogServer(environment) as server:
        server.wait_for_log(f"GB, from {folder}")

    (folder / "manifest.json").unlink()
    with CogServer(environment) as server:
        assert f"since {folder} has no manifest.json" in server.health()["setup"]["logs"]
        np.testing.assert_array_equal(pixels(server.predict(REQUEST)), from_the_bucket)

    del environment["MODEL_BUCKET_NAME"]
    with CogServer(environment) as server:
        health = server.health()
        assert health["status"] == "SETUP_FAILED"
        assert f"there is nowhere to read {MODEL} from" in health["setup"]["logs"]
        assert "Traceback" not in server.logs


def test_a_damaged_file_costs_a_chunk_from_the_bucket_and_changes_no_picture(
    own_deployment, image, tmp_path, from_the_bucket
):
    folder = shutil.copytree(image / "model", tmp_path / "model")
    bucket = own_deployment.bucket(own_deployment.models)
    unet = next(
        file
        for file in find_snapshot(bucket, MODEL).files
        if file.is_weights and file.path.startswith("unet/")
    )
    data = bytearray((folder / unet.path).read_bytes())
    data[-100] ^= 0x10
    (folder / unet.path).write_bytes(data)
    own_deployment.s3.forget_requests()
    with CogServer(own_deployment.environment(MODEL_FOLDER=str(folder))) as server:
        assert f"{folder / unet.path} is damaged" in server.health()["setup"]["logs"]
        np.testing.assert_array_equal(pixels(server.predict(REQUEST)), from_the_bucket)
    weights = {path for path, _ in asked_for(own_deployment) if path.endswith(".safetensors")}
    assert weights == {unet.key.removeprefix(f"{MODEL}/")}


def test_stock_diffusers_opens_the_baked_folder(image, small_sdxl):
    baked = StableDiffusionXLPipeline.from_pretrained(image / "model")
    stock = StableDiffusionXLPipeline.from_pretrained(small_sdxl)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(stock, part).state_dict()
        found = getattr(baked, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
