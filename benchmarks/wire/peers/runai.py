"""Run:ai Model Streamer: C++ threads that read safetensors from S3 into tensors (runai-model-streamer)."""

from __future__ import annotations

import os
from collections.abc import Callable

from benchmarks.wire.target import Held, Target


def prepare(target: Target, *, concurrency: int) -> Callable[[], Held]:
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(concurrency)
    os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
    os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = "-1"
    os.environ["AWS_ENDPOINT_URL"] = target.endpoint
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    paths = [f"s3://{target.bucket}/{found.key}" for found in target.weights]

    def load() -> Held:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths)
            tensors = list(streamer.get_tensors())  # by default each belongs to its caller
        return Held(sum(tensor.nbytes for _, tensor in tensors), tensors)

    return load
