"""A small published model in a folder that a plain server can serve as a bucket: many loads, no S3 rights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from settings import StorageSettings
from weights import Bucket
from weights.chunks import CHUNK_SIZE
from weights.folder import hash_folder
from weights.manifest import dump_latest, dump_manifest, make_manifest
from weights.transport import Patience

BUCKET = "models"
MODEL = "ByteDance/Small"
RECIPE = {"steps": [4]}

# Short of everything, so that hundreds of loads that meet faults take seconds.
IMPATIENT = Patience(connect=2.0, stall=0.3, floor=20_000, pause=0.005)


@dataclass(frozen=True)
class PublishedFolder:
    """`root` is what a server serves; `tensors` is what a reader must end up with, by (path, name)."""

    root: Path
    version: str
    tensors: dict[tuple[str, str], np.ndarray]
    configs: dict[str, bytes]

    @property
    def folder(self) -> Path:
        """Where the version's files lie."""
        return self.root / BUCKET / MODEL / self.version

    def bytes_of_model(self) -> int:
        return sum(
            file.stat().st_size for file in self.folder.rglob("*") if file.name != "manifest.json"
        )


def write_published(root: Path, *, seed: int = 0, chunks: int = 1) -> PublishedFolder:
    """Publish a model of one file of `chunks` chunks and a little more, and of four small ones."""
    random = np.random.default_rng(seed)
    files = {
        "unet/diffusion_pytorch_model.safetensors": {
            "small": random.standard_normal(5, dtype="float32"),
            "large": random.standard_normal((chunks, CHUNK_SIZE // 4), dtype="float32"),
            "none": np.zeros((0, 3), dtype="float32"),
            "scalar": np.array(seed, dtype="int64"),
            "end": random.standard_normal(70_000, dtype="float32"),
        },
        "text_encoder/model.safetensors": {"a": random.standard_normal((300, 70), dtype="float32")},
        "vae/model.safetensors": {"b": random.standard_normal(1, dtype="float32")},
    }
    configs = {"model_index.json": b"{}", "unet/config.json": b'{"a": 1}'}
    staging = root / "staging"
    for path, tensors in files.items():
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, staging / path)
    for path, data in configs.items():
        (staging / path).write_bytes(data)
    manifest = make_manifest(hash_folder(staging), RECIPE | {"seed": seed})
    model = root / BUCKET / MODEL
    model.mkdir(parents=True, exist_ok=True)
    staging.rename(model / manifest.version)
    (model / manifest.version / "manifest.json").write_bytes(dump_manifest(manifest))
    (model / "latest.json").write_bytes(dump_latest(manifest.version))
    tensors = {(path, name): data for path, found in files.items() for name, data in found.items()}
    return PublishedFolder(root, manifest.version, tensors, configs)


def bucket_at(endpoint_url: str, *, style: str = "path", patience: Patience = IMPATIENT) -> Bucket:
    settings = StorageSettings(
        AWS_ENDPOINT_URL_S3=endpoint_url,
        AWS_ACCESS_KEY_ID="tid_reader",
        AWS_SECRET_ACCESS_KEY="tsec_hunter2",
        S3_ADDRESSING_STYLE=style,
    )
    return Bucket(settings, BUCKET, patience=patience)


def read_all(stream) -> dict[tuple[str, str], np.ndarray]:
    dtypes = {"F32": "float32", "I64": "int64", "F16": "float16"}
    return {
        (tensor.path, tensor.name): np.frombuffer(tensor.data, dtype=dtypes[tensor.dtype]).reshape(
            tensor.shape
        )
        for tensor in stream.tensors()
    }


def assert_whole(stream, published: PublishedFolder) -> None:
    """Every config and tensor, byte for byte."""
    got = read_all(stream)
    assert stream.configs() == published.configs
    assert got.keys() == published.tensors.keys()
    for name, array in published.tensors.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name
