"""One cold start in a process of its own: `python -m benchmarks.wire.cold_start MODE TARGET CONNECTIONS`.

It prints one line of JSON when it is ready; its clock began when the process was started, not here.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.wire.target import Target, empty_folder

HOLDING: list[Any] = []  # what was built, so that nothing is freed before the clock is read


def product(target: Target, connections: int) -> None:
    """Exactly what the container does: `Runner.setup`, told by its environment."""
    del target, connections
    runner = importlib.import_module("predict").Runner()
    runner.setup()
    HOLDING.append(runner)


def plain(target: Target, connections: int) -> None:
    """What people do without this product: boto3 downloads all of it, then stock `from_pretrained` reads it."""
    from boto3.s3.transfer import TransferConfig

    from benchmarks.wire.peers.boto import client

    folder = empty_folder(target.scratch)
    s3 = client(target, connections)
    config = TransferConfig(max_concurrency=connections)
    for found in (*target.others, *target.weights):
        file = folder / found.key.removeprefix(f"{target.model_path}/{target.version}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(target.bucket, found.key, str(file), Config=config)

    from diffusers import StableDiffusionXLPipeline

    HOLDING.append(StableDiffusionXLPipeline.from_pretrained(folder))


def stream(target: Target, connections: int) -> None:
    """This loader alone: the bytes in memory, torch never imported."""
    from benchmarks.wire import ours

    HOLDING.append(ours.prepare(target, connections=connections)())


def build(target: Target, connections: int) -> None:
    """Imports and build alone: the same engine from the same files, which lie in memory as local files."""
    del connections
    from diffusion.build import build_pipeline
    from diffusion.device import choose_device, choose_dtype
    from diffusion.engine import Engine
    from diffusion.recipe import Recipe

    folder = Path(os.environ["BENCH_FOLDER"])
    prefix = f"{target.model_path}/{target.version}/"
    configs = {
        found.key.removeprefix(prefix): (folder / found.key).read_bytes() for found in target.others
    }
    recipe = Recipe.model_validate(json.loads(configs["recipe.json"]))
    device = choose_device("cpu")
    dtype = choose_dtype(device, "auto")
    tensors = _local_tensors(folder, target, prefix)
    pipeline = build_pipeline(configs, tensors, recipe, device=device, dtype=dtype)
    HOLDING.append(Engine(pipeline, recipe))


@dataclass(frozen=True)
class _LocalTensor:
    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def _local_tensors(folder: Path, target: Target, prefix: str) -> Iterator[_LocalTensor]:
    from weights.safetensors_layout import LENGTH_BYTES, header_length, parse_header

    for found in target.weights:
        with (folder / found.key).open("rb", buffering=0) as source:
            first = source.read(LENGTH_BYTES)
            header = first + source.read(header_length(first, found.key, found.size) - len(first))
            for place in parse_header(header, found.key, found.size):
                data = mmap.mmap(
                    -1,
                    max(place.end - place.start, 1),
                    flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                )
                source.seek(place.start)
                source.readinto(memoryview(data)[: place.end - place.start])
                path = found.key.removeprefix(prefix)
                yield _LocalTensor(path, place.name, place.dtype, place.shape, data)


MODES: dict[str, Callable[[Target, int], None]] = {
    "product": product,
    "plain": plain,
    "stream": stream,
    "build": build,
}


def main() -> None:
    mode, target_file, connections = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    MODES[mode](Target.load(Path(target_file).read_text()), int(connections))
    print(json.dumps({"ready": time.monotonic()}), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
