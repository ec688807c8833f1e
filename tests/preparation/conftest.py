"""Small real models, a Hub that serves them, and a place to put them: built once, served over loopback."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from demo.small_sdxl import write_small_sdxl
from preparation import Progress, Request, make_plan, prepare
from preparation.assemble import Prepared
from preparation.hub import Hub
from settings import load_storage_settings
from tests.preparation.repositories import (
    write_base,
    write_finetune,
    write_lightning,
    write_vae,
)
from tests.support.hub import LoopbackHub
from weights import Bucket

LIGHTNING = "ByteDance/SDXL-Lightning"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
VAE = "madebyollin/sdxl-vae-fp16-fix"
FINETUNE = "KBlueLeaf/Kohaku-XL-Zeta"
TOKEN = "hf_reader"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_model.py"


@dataclass(frozen=True)
class Models:
    """Folders that tests copy before they change anything."""

    half: Path
    full: Path
    other_half: Path
    other_full: Path
    base: Path
    lightning: Path
    vae: Path
    finetune: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")

    def small(name: str, seed: int, dtype: str) -> Path:
        return write_small_sdxl(root / name, seed=seed, dtype=dtype, lightning=False)

    half, full = small("half", 0, "float16"), small("full", 0, "float32")
    other_half, other_full = small("other-half", 1, "float16"), small("other-full", 1, "float32")
    return Models(
        half,
        full,
        other_half,
        other_full,
        base=write_base(root / "base", half, full),
        lightning=write_lightning(root / "lightning", other_half),
        vae=write_vae(root / "vae", other_full),
        finetune=write_finetune(root / "finetune", full),
    )


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(accepted_tokens=(TOKEN,)) as hub:
        yield hub


@pytest.fixture
def lightning_hub(loopback_hub: LoopbackHub, models: Models) -> LoopbackHub:
    """The three repos that SDXL-Lightning is made of."""
    loopback_hub.add(LIGHTNING, models.lightning)
    loopback_hub.add(BASE, models.base)
    loopback_hub.add(VAE, models.vae)
    return loopback_hub


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path) -> Hub:
    """A client of the loopback Hub with an empty cache and no token."""
    return Hub(endpoint=loopback_hub.url, cache_dir=tmp_path / "cache")


@pytest.fixture
def quiet() -> Progress:
    return Progress(io.StringIO())


Prepare = Callable[..., Prepared]


@pytest.fixture
def run(hub: Hub, tmp_path: Path, quiet: Progress) -> Prepare:
    """Plan and prepare a source; keyword arguments are those of `Request`."""

    def prepared(source: str | Path, **options: object) -> Prepared:
        request = Request(str(source), **{"hub": hub, "folder": tmp_path / "prepared", **options})
        return prepare(request, make_plan(request), quiet)

    return prepared


@pytest.fixture
def own(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model's folder, to be changed at will."""

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "own" / folder.name))

    return copied


@pytest.fixture
def bucket(s3: EmbeddedS3, new_bucket: Callable[[], str]) -> Bucket:
    """An empty bucket of this test's own."""
    return Bucket(load_storage_settings(s3.environment()), new_bucket())


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def environment(loopback_hub: LoopbackHub, s3: EmbeddedS3, tmp_path: Path) -> dict[str, str]:
    """What a person's shell would have: the bucket's keys, and a Hub with an empty cache and no token."""
    return {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "HF_", "SOURCE_", "GOOGLE_", "STORAGE_"))
        },
        **s3.environment(),
        "HF_ENDPOINT": loopback_hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def command(environment: dict[str, str], tmp_path: Path) -> Callable[..., Ran]:
    """Run scripts/prepare_model.py as a person would, from another folder; keyword arguments change variables.

    However it ends, it must not show a traceback or the secret key.
    """

    def ran(*arguments: str | Path, **changed: str | None) -> Ran:
        merged = {**environment, **changed}
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments), "--destdir", str(tmp_path / "prepared")],
            env={name: value for name, value in merged.items() if value is not None},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return ran
