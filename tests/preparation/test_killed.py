"""The command killed with SIGKILL at chosen moments and run again: the same version in the end, and no reader hurt.

A moment is a request: the proxy before the server kills the command as it passes one on, or once the server has done
what it says. KILLS=50 kills it that often; KILLS_SEED chooses other moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from demo.s3 import EmbeddedS3
from settings import load_storage_settings
from tests.preparation.conftest import SCRIPT, Models
from tests.support.fault_proxy import FaultProxy, ProxyRequest
from tests.support.faults import BEFORE_HEAD, Fault, FaultKind
from weights import Bucket, open_model, read_latest
from weights.unfinished import unfinished_uploads

KILLS = int(os.environ.get("KILLS", "8"))
SEED = int(os.environ.get("KILLS_SEED", "20261125"))
NAME = "me/model"
UNET_BYTES = 70_000_000  # three parts
# An undisturbed publication of this model is about 80 requests, 30 of which write.
REQUESTS, WRITES = 80, 20


class Assassin:
    """Decides for the proxy, and kills the command at the request that was chosen."""

    def __init__(self) -> None:
        self._left = 0
        self._writes_only = False
        self._after = False
        self._lock = threading.Lock()
        self.victim: subprocess.Popen[str] | None = None

    def choose(self, chance: random.Random) -> None:
        self._writes_only = chance.random() < 0.8
        self._left = chance.randint(1, WRITES if self._writes_only else REQUESTS)
        self._after = chance.random() < 0.5

    def decide(self, request: ProxyRequest) -> Fault | None:
        with self._lock:
            if self.victim is None or (self._writes_only and request.method in ("GET", "HEAD")):
                return None
            self._left -= 1
            if self._left:
                return None
            if self._after:
                # The server does it, and nobody hears of it: the kill comes with the answer.
                threading.Timer(0.05, self._strike).start()
                return Fault(FaultKind.STALL, at=BEFORE_HEAD)
            self._strike()
            return None

    def _strike(self) -> None:
        assert self.victim is not None
        self.victim.send_signal(signal.SIGKILL)


@pytest.fixture
def folder(models: Models, tmp_path: Path) -> Path:
    """A model whose UNet goes up in parts."""
    folder = Path(shutil.copytree(models.half, tmp_path / "model"))
    write_unet(folder, 0)
    return folder


def write_unet(folder: Path, seed: int) -> None:
    random_bytes = np.random.default_rng(seed).integers(0, 2**15, UNET_BYTES // 2, dtype="uint16")
    save_file(
        {"weight": (random_bytes & 0x3BFF).view("float16")},
        folder / "unet/diffusion_pytorch_model.safetensors",
    )


@pytest.fixture
def readers(bucket: Bucket) -> Iterator[Callable[[], int]]:
    """Loads whatever is served, over and over; the function stops that and says how often it went well."""
    stopped = threading.Event()
    loads: list[str] = []
    failures: list[BaseException] = []

    def read() -> None:
        while not stopped.wait(0.1):
            try:
                if read_latest(bucket, NAME) is None:
                    continue
                with open_model(bucket, NAME) as stream:
                    stream.configs()
                    for _ in stream.tensors():
                        pass
                    loads.append(stream.snapshot.version)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test fails with it
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()

    def stop() -> int:
        stopped.set()
        reader.join()
        assert failures == []
        return len(loads)

    yield stop
    stopped.set()
    reader.join()


def contents(client: Any, bucket: str, version: str) -> dict[str, tuple[bytes, Any, str]]:
    """Every byte of a version, and what its objects say of themselves."""
    prefix = f"{NAME}/{version}/"
    found = {}
    for listed in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        answer = client.get_object(Bucket=bucket, Key=listed["Key"])
        found[listed["Key"].removeprefix(prefix)] = (
            answer["Body"].read(),
            answer["Metadata"],
            answer["ContentType"],
        )
    return found


def test_whenever_it_is_killed_the_next_run_ends_as_if_nothing_had_happened(
    environment: dict[str, str],
    bucket: Bucket,
    new_bucket: Callable[[], str],
    s3: EmbeddedS3,
    folder: Path,
    tmp_path: Path,
    readers: Callable[[], int],
) -> None:
    chance = random.Random(SEED)
    assassin = Assassin()

    def begin(name: str, endpoint: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, SCRIPT, folder, name, "--name", NAME),
                *("--destdir", tmp_path / "prepared"),
            ],
            env=environment | {"AWS_ENDPOINT_URL_S3": endpoint},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = completed = 0
    with FaultProxy(s3.endpoint_url, assassin.decide) as proxy:
        while killed < KILLS:
            assassin.choose(chance)
            with begin(bucket.name, proxy.endpoint_url) as victim:
                assassin.victim = victim
                _, said = victim.communicate(timeout=120)
                assassin.victim = None
            if victim.returncode == -signal.SIGKILL:
                killed += 1
                continue
            assert victim.returncode == 0, said
            completed += 1
            write_unet(folder, completed)  # and on to the next version
    with begin(bucket.name, s3.endpoint_url) as last:
        _, said = last.communicate(timeout=120)
    assert last.returncode == 0, said

    undisturbed = new_bucket()
    with begin(undisturbed, s3.endpoint_url) as other:
        _, said = other.communicate(timeout=120)
    assert other.returncode == 0, said
    version = read_latest(bucket, NAME)
    assert version is not None
    settings = load_storage_settings(environment)
    assert read_latest(Bucket(settings, undisturbed), NAME) == version
    client = s3.client()
    assert contents(client, bucket.name, version) == contents(client, undisturbed, version)
    assert list(unfinished_uploads(bucket, "")) == []
    assert readers() > 0
