"""A model of plain numpy tensors, large enough for several chunks, and buckets to put it into."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from demo.s3 import EmbeddedS3, Keypair
from settings import load_storage_settings
from weights import Bucket, Publication, plan_publication, publish
from weights.chunks import CHUNK_SIZE

RECIPE = {"pipeline": "StableDiffusionXLPipeline", "steps": [4]}
MODEL = "ByteDance/Small"
NUMPY_DTYPES = {"F32": "float32", "F16": "float16", "I64": "int64"}


def write_model(folder: Path, *, chunks: int = 1) -> Path:
    """A folder laid out as diffusers does: a tensor of `chunks` chunks across their borders, some small, one empty."""
    random = np.random.default_rng(0)
    floats = CHUNK_SIZE // 4
    unet = {
        "first": random.standard_normal(3, dtype="float32"),
        "empty": np.zeros((0, 7), dtype="float32"),
        "straddles": random.standard_normal((chunks, floats), dtype="float32"),
        "scalar": np.array(7, dtype="int64"),
        "last": random.standard_normal(floats // 8, dtype="float32"),
    }
    for component, tensors in {
        "unet": unet,
        "vae": {"x": random.standard_normal((3, 4), dtype="float32").astype("float16")},
    }.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text('{"_class_name": "Something"}')
        save_file(tensors, folder / component / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "A"], "vae": ["diffusers", "B"]}'
    )
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to publish; read only."""
    return write_model(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A folder to publish that the test may change."""
    return write_model(tmp_path / "own-model")


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Where a node cache will be; it is not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """A folder with a file that goes up in several parts, and that the test may change."""
    return write_model(tmp_path / "large-model", chunks=4)


@pytest.fixture
def bucket_for(s3: EmbeddedS3) -> Callable[..., Bucket]:
    """A Bucket as the product connects to it, with the given keypair or the admin's."""

    def make(name: str, keypair: Keypair | None = None) -> Bucket:
        settings = load_storage_settings(s3.environment(keypair))
        return Bucket(settings, name)

    return make


@pytest.fixture
def bucket(s3: EmbeddedS3, bucket_for: Callable[..., Bucket]) -> Bucket:
    """A fresh, empty bucket."""
    name = f"weights-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(name)
    return bucket_for(name)


def publish_folder(bucket: Bucket, folder: Path, recipe: dict[str, object] = RECIPE) -> Publication:
    publication = plan_publication(folder, bucket, MODEL, recipe)
    publish(publication)
    return publication


@pytest.fixture
def published(bucket: Bucket, model: Path) -> Publication:
    """The model, published into the fresh bucket."""
    return publish_folder(bucket, model)
