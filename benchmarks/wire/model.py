"""A model of a chosen size in a folder laid out as a bucket, with the manifest that publishing would write.

The tensors are SDXL's in shape and mix: matrices of 2 to 26 MB in float16, and thousands of small biases. Their
bytes are random, so nothing on the way can compress them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.wire.target import Object
from weights.folder import hash_folder
from weights.manifest import (
    LATEST_NAME,
    MANIFEST_NAME,
    dump_latest,
    dump_manifest,
    make_manifest,
)
from weights.safetensors_layout import LENGTH_BYTES, header_length

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "bench-bucket"
MODEL_PATH = "bench/model"
SHARD_BYTES = 960_000_000  # caches such as TAG keep objects of up to 1 GiB
HALF = 2  # bytes of a float16
SEED = 20261123

# One transformer block of SDXL's UNet, and the biases and norms of the residual layers around it.
BLOCK: Mapping[str, tuple[int, ...]] = {
    **{f"norm{n}.{part}": (1280,) for n in (1, 2, 3) for part in ("weight", "bias")},
    **{f"attn1.to_{part}.weight": (1280, 1280) for part in ("q", "k", "v", "out.0")},
    **{f"attn2.to_{part}.weight": (1280, 2048) for part in ("k", "v")},
    **{f"attn2.to_{part}.weight": (1280, 1280) for part in ("q", "out.0")},
    **{f"attn{n}.to_out.0.bias": (1280,) for n in (1, 2)},
    "ff.net.0.proj.weight": (10240, 1280),
    "ff.net.0.proj.bias": (10240,),
    "ff.net.2.weight": (1280, 5120),
    "ff.net.2.bias": (1280,),
    **{f"resnets.{n}.norm.bias": (320 * (1 + n % 4),) for n in range(60)},
}


@dataclass(frozen=True)
class Published:
    """What `publish_folder` has put under the bucket's folder."""

    bucket: str
    model_path: str
    version: str
    weights: tuple[Object, ...]
    others: tuple[Object, ...]
    tensor_bytes: int

    @property
    def prefix(self) -> str:
        return f"{self.model_path}/{self.version}"


def publish_random_model(root: Path, size: int) -> Published:
    """Write a model of about `size` bytes into the bucket's folder under `root`."""
    folder = root / "unpublished"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}\n')
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}\n')
    random = np.random.default_rng(SEED)
    shards = list(_shards(size))
    for number, shard in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / "unet" / name, shard, random.bytes)
    return publish_folder(root, folder, MODEL_PATH, {})


def publish_folder(
    root: Path, folder: Path, model_path: str, recipe: Mapping[str, Any]
) -> Published:
    """Move a folder to where publishing it would put its files, and write its manifest and latest.json."""
    manifest = make_manifest(hash_folder(folder, jobs=2), recipe)
    home = root / BUCKET / model_path
    home.mkdir(parents=True)
    folder.rename(home / manifest.version)
    (home / manifest.version / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    (home / LATEST_NAME).write_bytes(dump_latest(manifest.version))
    objects = [
        Object(f"{model_path}/{manifest.version}/{entry.path}", entry.size)
        for entry in manifest.files
    ]
    weights = tuple(found for found in objects if found.key.endswith(".safetensors"))
    return Published(
        bucket=BUCKET,
        model_path=model_path,
        version=manifest.version,
        weights=weights,
        others=tuple(found for found in objects if found not in weights),
        tensor_bytes=sum(_tensor_bytes(root / BUCKET / found.key) for found in weights),
    )


def publish_small_sdxl(root: Path, size: int) -> Published:
    """The demo's real SDXL in float32, as wide as makes it about `size` bytes."""
    from demo.small_sdxl import write_small_sdxl

    width = max(1, round((size / 8.2e6) ** 0.5))  # the UNet is 8.2 MB at width 1
    folder = write_small_sdxl(root / "unpublished-sdxl", width=width, shard_bytes=SHARD_BYTES)
    recipe = json.loads((folder / "recipe.json").read_text())
    return publish_folder(root, folder, "bench/sdxl", recipe)


def write_tensorizer_copy(root: Path, published: Published) -> str | None:
    """The same tensors in Tensorizer's format; returns the object's key, or None where it is not installed."""
    key = f"{published.model_path}/tensorizer/model.tensors"
    file = root / BUCKET / key
    file.parent.mkdir(parents=True)
    writer = "benchmarks.wire.peers.tensorizer_stream"
    source = root / BUCKET / published.prefix
    finished = subprocess.run(
        [sys.executable, "-m", writer, str(source), str(file)],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    if finished.returncode and b"ModuleNotFoundError" not in finished.stderr:
        sys.stderr.write(finished.stderr.decode(errors="replace"))
    return None if finished.returncode else key


def _shards(size: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Block after block until `size` is reached, cut where a shard would be too large."""
    shard: dict[str, tuple[int, ...]] = {}
    total = in_shard = number = 0
    while total < size:
        for name, shape in BLOCK.items():
            count = prod(shape) * HALF
            if in_shard + count > SHARD_BYTES:
                yield shard
                shard, in_shard = {}, 0
            shard[f"blocks.{number}.{name}"] = shape
            in_shard += count
            total += count
        number += 1
    yield shard


def _write_safetensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], random_bytes: Callable[[int], bytes]
) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        end = place + prod(shape) * HALF
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, end]}
        place = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as output:
        output.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for shape in shapes.values():
            output.write(random_bytes(prod(shape) * HALF))


def _tensor_bytes(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as source:
        return size - header_length(source.read(LENGTH_BYTES), str(file), size)
