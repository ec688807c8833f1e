"""This product's own loader, as its users call it. The one file here that knows its interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.wire.target import KEY, Held, Target


def prepare(target: Target, **options: Any) -> Callable[[], Held]:
    """All tensors held in memory. The options are those of `weights.ReadOptions`."""
    from settings import StorageSettings
    from weights import Bucket, ReadOptions, open_model

    settings = StorageSettings.model_validate(
        {
            "AWS_ENDPOINT_URL_S3": target.endpoint,
            "AWS_REGION": "auto",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
        }
    )
    if options.get("cache_folder"):
        options["cache_folder"] = Path(options["cache_folder"])

    def load() -> Held:
        bucket = Bucket(settings, target.bucket)
        with open_model(bucket, target.model_path, options=ReadOptions(**options)) as stream:
            stream.configs()
            tensors = list(stream.tensors())
            counters = dict(stream.counters())
        return Held(sum(memoryview(t.data).nbytes for t in tensors), tensors, counters)

    return load
