"""One replica's load as a process of its own: `python -m tests.weights.replica ENDPOINT CACHE READER [LIMIT]`.

Says "ready" when it has imported everything, begins at the first line on its standard input, and prints the digest of
all it has loaded, with the load's counters, as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tests.weights.folder_bucket import MODEL, bucket_at
from weights import ReadOptions, open_model
from weights.transport import Patience


def digest_of(buffers: Iterable[tuple[tuple[str, str], Any]]) -> str:
    """One digest of all tensors, whatever order they come in."""
    digests = sorted(
        (path, name, hashlib.sha256(memoryview(data).cast("B")).hexdigest())
        for (path, name), data in buffers
        if memoryview(data).nbytes
    )
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def main(
    endpoint_url: str, cache: str, reader: Literal["thread", "process"], limit: str = ""
) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    # As patient as in production: on a busy machine, what another replica fetches is soon overdue otherwise.
    bucket = bucket_at(endpoint_url, patience=Patience())
    options = ReadOptions(
        reader=reader, cache_folder=Path(cache), cache_bytes=int(limit) if limit else None
    )
    print("ready", flush=True)
    sys.stdin.readline()
    with open_model(bucket, MODEL, options=options) as stream:
        configs = stream.configs()
        digest = digest_of(((found.path, found.name), found.data) for found in stream.tensors())
    print(
        json.dumps(
            {
                "tensors": digest,
                "configs": {path: data.decode() for path, data in configs.items()},
                "counters": stream.counters(),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type] # the tests' own words
