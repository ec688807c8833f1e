"""A whole deployment on loopback: buckets, a published model, a restricted keypair, and the real Cog server."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3, Keypair
from scripts.fill_iam import fill
from settings import load_storage_settings
from tests.support.cog_server import REPOSITORY, CogServer
from weights import Bucket, find_snapshot

MODEL = "demo/small-sdxl"
TUTORIAL_INPUT = {
    "prompt": "The space needle in Seattle, best quality, masterpiece",
    "aspect_ratio": "1:1",
    "guidance_scale": 3.5,
    "num_inference_steps": 4,
    "max_sequence_length": 512,
    "output_format": "png",
    "num_outputs": 1,
}


@dataclass(frozen=True)
class Deployment:
    """What a person has after the tutorial's first half: two buckets, a model in one, a keypair for the runner."""

    s3: EmbeddedS3
    models: str
    images: str
    workload: Keypair

    def environment(self, **changes: str) -> dict[str, str]:
        """The tutorial's seven variables, and one thread a process: the suite has two cores."""
        return {
            **self.s3.environment(self.workload),
            "MODEL_PATH": MODEL,
            "MODEL_BUCKET_NAME": self.models,
            "PUBLIC_BUCKET_NAME": self.images,
            "OMP_NUM_THREADS": "1",
            **changes,
        }

    def bucket(self, name: str) -> Bucket:
        """A bucket seen with the admin's rights."""
        return Bucket(load_storage_settings(self.s3.environment()), name)


def deploy(s3: EmbeddedS3, folder: Path) -> Deployment:
    """Do what the tutorial says: create buckets, run prepare_model.py, make a key with iam/model-runner.json."""
    unique = uuid.uuid4().hex[:8]
    models, images = f"model-storage-{unique}", f"generated-images-{unique}"
    s3.create_bucket(models)
    s3.create_bucket(images)
    subprocess.run(
        [sys.executable, "scripts/prepare_model.py", str(folder), models, "--name", MODEL],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), **s3.environment()},
        check=True,
        capture_output=True,
        text=True,
    )
    policy = json.loads((REPOSITORY / "iam" / "model-runner.json").read_text())
    workload = s3.create_user(
        f"workload-{unique}", fill(policy, model_bucket=models, image_bucket=images)
    )
    return Deployment(s3, models, images, workload)


@pytest.fixture(scope="session")
def deployment(s3: EmbeddedS3, small_sdxl: Path) -> Deployment:
    """For tests that change nothing in its buckets but add images."""
    return deploy(s3, small_sdxl)


@pytest.fixture
def own_deployment(s3: EmbeddedS3, small_sdxl: Path) -> Deployment:
    """For a test that breaks something."""
    return deploy(s3, small_sdxl)


@pytest.fixture(scope="session")
def server(deployment: Deployment) -> Iterator[CogServer]:
    """The Cog server, READY, with nothing but the restricted keypair."""
    with CogServer(deployment.environment()) as running:
        assert running.health()["status"] == "READY", running.tail()
        yield running


def image_urls(response: Any) -> list[str]:
    assert response.status == 200, response
    assert response.body["status"] == "succeeded", response.body
    urls: list[str] = response.body["output"]
    return urls


def fetch(url: str) -> bytes:
    """Fetch as anybody with the URL could: without a keypair."""
    with urllib.request.urlopen(url) as answer:
        data: bytes = answer.read()
        return data


def version_of(deployment: Deployment) -> str:
    return find_snapshot(deployment.bucket(deployment.models), MODEL).version
