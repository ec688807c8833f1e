"""A model that is published while a server serves, or starts, is served in the end, and nobody is turned away."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import Engine
from loading import TIMES_TO_BEGIN, load
from settings import load_runner_settings
from tests.e2e.conftest import MODEL, Deployment, fetch, image_urls, version_of
from tests.support.cog_server import REPOSITORY, CogServer, Response
from tests.support.fault_proxy import FaultProxy, ProxyRequest
from tests.support.faults import Fault
from weights import ObjectChangedError
from weights.waterfall import JSON_NAME, SVG_NAME, ColdStart

SVG = "{http://www.w3.org/2000/svg}"
REQUEST = {"prompt": "a lighthouse", "seed": 7}
DEADLINE = 120  # seconds; only ever waited out by a test that fails
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def other_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with other weights, and with nothing else changed; read only."""
    return write_small_sdxl(tmp_path_factory.mktemp("other-sdxl") / "model", seed=1)


def publish(deployment: Deployment, folder: Path) -> None:
    """Publish what is in the folder as the model's next version, as a person would."""
    subprocess.run(
        [
            sys.executable,
            "scripts/prepare_model.py",
            str(folder),
            deployment.models,
            "--name",
            MODEL,
        ],
        cwd=REPOSITORY,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder.parent),
            **deployment.s3.environment(),
        },
        check=True,
        capture_output=True,
        text=True,
    )


def pixels(response: Response) -> np.ndarray:
    (url,) = image_urls(response)
    return np.asarray(Image.open(io.BytesIO(fetch(url))).convert("RGB"))


class Callers:
    """Threads that ask for one picture after another until the block ends; `responses` is all they got."""

    def __init__(self, server: CogServer, number: int) -> None:
        self.responses: list[Response] = []
        self._server = server
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _ask(self) -> None:
        while not self._done.is_set():
            self.responses.append(self._server.predict(REQUEST))

    def wait_for(self, condition: Callable[[Response], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not any(condition(response) for response in list(self.responses)):
            assert time.monotonic() < deadline, what
            time.sleep(0.05)  # the server decides when; it can only be polled


def version_in(response: Response) -> Any:
    return response.body["metrics"]["model_version"] if response.status == 200 else None


@pytest.mark.slow
def test_a_version_published_while_requests_run_serves_from_then_on_and_fails_none(
    own_deployment, other_sdxl
):
    first = version_of(own_deployment)
    environment = own_deployment.environment(MODEL_REFRESH_SECONDS="1")
    with CogServer(environment) as server:
        before = pixels(server.predict(REQUEST))
        with Callers(server, 2) as callers:
            callers.wait_for(lambda found: version_in(found) == first, "no request is answered")
            publish(own_deployment, other_sdxl)
            second = version_of(own_deployment)
            assert second != first
            callers.wait_for(lambda found: version_in(found) == second, "it is never taken over")
        after = server.predict(REQUEST)
        server.wait_for_log(f"version {second} was published: reading it beside {first}")

    responses = callers.responses
    assert all(response.status == 200 for response in responses), responses
    assert {response.body["status"] for response in responses} == {"succeeded"}
    assert {version_in(response) for response in responses} == {first, second}
    # Each picture is one version's, whole: the one it says.
    assert version_in(after) == second
    for response in responses:
        expected = before if version_in(response) == first else pixels(after)
        np.testing.assert_array_equal(pixels(response), expected)
    assert (pixels(after) != before).any()

    # What a server makes that has only ever had the second.
    with CogServer(own_deployment.environment()) as fresh:
        again = fresh.predict(REQUEST)
        assert version_in(again) == second
        np.testing.assert_array_equal(pixels(again), pixels(after))


@pytest.mark.slow
def test_a_version_that_cannot_be_served_is_said_and_the_old_one_goes_on(
    own_deployment, other_sdxl
):
    first = version_of(own_deployment)
    bucket = own_deployment.bucket(own_deployment.models)
    with CogServer(own_deployment.environment(MODEL_REFRESH_SECONDS="1")) as server:
        before = pixels(server.predict(REQUEST))

        bucket.put(f"{MODEL}/latest.json", b"{", content_type="application/json")
        server.wait_for_log(f"not refreshed, and {first} goes on: ")
        np.testing.assert_array_equal(pixels(server.predict(REQUEST)), before)

        publish(own_deployment, other_sdxl)
        second = version_of(own_deployment)
        server.wait_for_log(f"Version {second} took over from {first}")
        assert version_in(server.predict(REQUEST)) == second


def test_a_start_leaves_its_timeline_where_it_was_told_to(deployment, tmp_path):
    folder = tmp_path / "new" / "cold-start"
    with CogServer(deployment.environment(COLD_START_DIR=str(folder))) as server:
        assert server.health()["status"] == "READY"
        assert sorted(path.name for path in folder.iterdir()) == [JSON_NAME, SVG_NAME]
        record = json.loads((folder / JSON_NAME).read_text())
        picture = ET.fromstring((folder / SVG_NAME).read_text())  # noqa: S314 - written by the code under test

    assert (record["model"], record["version"]) == (MODEL, version_of(deployment))
    phases = {phase["name"]: phase for phase in record["phases"]}
    assert {"manifest", "imports", "bytes", "build"} <= phases.keys()
    assert all(0 < phase["start_s"] <= phase["end_s"] for phase in record["phases"])
    assert all(phase["end_s"] <= record["ready_after_s"] for phase in record["phases"])
    assert phases["bytes"]["bytes"] > 1_000_000
    assert phases["manifest"]["end_s"] <= phases["bytes"]["end_s"] <= phases["build"]["end_s"]
    assert phases["imports"]["end_s"] <= phases["build"]["start_s"]
    assert picture.tag == f"{SVG}svg"
    drawn = {text.text for text in picture.iter(f"{SVG}text")}
    assert phases.keys() <= drawn


def test_a_start_that_fails_leaves_its_timeline_too(deployment, tmp_path):
    environment = deployment.environment(MODEL_PATH="no/such", COLD_START_DIR=str(tmp_path))
    with CogServer(environment) as server:
        assert server.health()["status"] == "SETUP_FAILED"
        record = json.loads((tmp_path / JSON_NAME).read_text())
        ET.fromstring((tmp_path / SVG_NAME).read_text())  # noqa: S314 - written by the code under test

    assert record["ready_after_s"] is None
    assert [(phase["name"], phase["failed"]) for phase in record["phases"]] == [("manifest", True)]


def test_a_folder_that_cannot_be_written_to_keeps_no_server_from_serving(deployment, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "cold-start"
    with CogServer(deployment.environment(COLD_START_DIR=str(folder))) as server:
        assert server.health()["status"] == "READY"
        server.wait_for_log(f"could not be written to {folder}")


# Started while the model is replaced. A bare folder: a published version is never overwritten.


def upload(deployment: Deployment, folder: Path, path: str) -> None:
    key = f"bare/{path}"
    deployment.bucket(deployment.models).client.upload_file(
        str(folder / path), deployment.models, key
    )


def bare_folder(deployment: Deployment, folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            upload(deployment, folder, file.relative_to(folder).as_posix())


def load_bare(deployment: Deployment, endpoint_url: str) -> Engine:
    environment = deployment.environment(
        **deployment.s3.environment(), MODEL_PATH="bare", DEVICE="cpu"
    )
    environment["AWS_ENDPOINT_URL_S3"] = endpoint_url
    return load(load_runner_settings(environment), ColdStart(), meanwhile=lambda: None)


class Overwriting:
    """Replaces the UNet's weights, each time by the next of `folders`, just before they are read."""

    def __init__(self, deployment: Deployment, folders: list[Path]) -> None:
        self._deployment = deployment
        self._folders = folders
        self._lock = threading.Lock()

    def __call__(self, request: ProxyRequest) -> Fault | None:
        if request.path.endswith(UNET):
            with self._lock:
                if self._folders:
                    upload(self._deployment, self._folders.pop(0), UNET)
        return None


def test_a_start_while_an_object_is_replaced_begins_anew_with_what_is_there_then(
    own_deployment, small_sdxl, other_sdxl, caplog
):
    bare_folder(own_deployment, small_sdxl)
    overwriting = Overwriting(own_deployment, [other_sdxl])
    with FaultProxy(own_deployment.s3.environment()["AWS_ENDPOINT_URL_S3"], overwriting) as proxy:
        engine = load_bare(own_deployment, proxy.endpoint_url)

    assert caplog.text.count("Beginning anew") == 1
    assert f"bare/{UNET} was replaced while it was read" in caplog.text
    with safe_open(other_sdxl / UNET, "pt") as expected:
        for name, tensor in engine._pipeline.unet.state_dict().items():
            assert (tensor == expected.get_tensor(name)).all()


def variants(folder: Path, count: int, into: Path) -> list[Path]:
    """Folders whose UNets differ, each from every other."""
    found = [into / str(number) for number in range(count)]
    for number, variant in enumerate(found):
        (variant / UNET).parent.mkdir(parents=True)
        data = bytearray((folder / UNET).read_bytes())
        data[-1] ^= number + 1
        (variant / UNET).write_bytes(data)
    return found


def test_an_object_that_is_replaced_again_and_again_is_an_error_in_the_end(
    own_deployment, small_sdxl, tmp_path
):
    bare_folder(own_deployment, small_sdxl)
    # More than there are attempts, for a busy machine has second tries beside slow ones; and no bytes that were there
    # before, with which such a try would be right.
    overwriting = Overwriting(own_deployment, variants(small_sdxl, 4 * TIMES_TO_BEGIN, tmp_path))
    with (
        FaultProxy(own_deployment.s3.environment()["AWS_ENDPOINT_URL_S3"], overwriting) as proxy,
        pytest.raises(ObjectChangedError, match=UNET),
    ):
        load_bare(own_deployment, proxy.endpoint_url)
