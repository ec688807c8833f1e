"""boto3, in the two ways people use it: files on a RAM disk, or ranges read into memory that is there already."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.wire.memory import fresh_memory
from benchmarks.wire.target import MEBIBYTE, Held, Span, Target, empty_folder

READ = 4 * MEBIBYTE  # bytes asked of the body at once


def client(target: Target, connections: int) -> Any:
    """Keys, region and certificate come from the environment, as everybody's do."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"}, max_pool_connections=connections)
    return boto3.client("s3", endpoint_url=target.endpoint, config=config)


def download(target: Target, *, connections: int | None = None) -> Callable[[], Held]:
    """`download_file` of one weight file after another, with its own defaults (10 threads of 8 MiB) or so many."""
    from boto3.s3.transfer import TransferConfig

    s3 = client(target, connections or 10)
    config = TransferConfig(max_concurrency=connections) if connections else TransferConfig()

    def load() -> Held:
        folder = empty_folder(target.scratch)
        for number, found in enumerate(target.weights):
            s3.download_file(target.bucket, found.key, str(folder / str(number)), Config=config)
        return Held(sum(file.stat().st_size for file in folder.iterdir()))

    return load


def read_into(target: Target, *, connections: int, mebibytes: int) -> Callable[[], Held]:
    """`get_object` of ranges in threads, each body read into its place in one large buffer."""
    s3 = client(target, connections)

    def load() -> Held:
        memory = fresh_memory(target.file_bytes)
        whole = memoryview(memory)

        def read(span: Span) -> int:
            last = span.start + span.length - 1
            answer = s3.get_object(
                Bucket=target.bucket, Key=span.key, Range=f"bytes={span.start}-{last}"
            )
            into = whole[span.place : span.place + span.length]
            filled = 0
            while filled < span.length:
                count = answer["Body"].readinto(into[filled : filled + READ])
                if not count:
                    raise ConnectionError("the body ended early")
                filled += count
            return filled

        with ThreadPoolExecutor(connections) as pool:
            return Held(sum(pool.map(read, target.spans(mebibytes * MEBIBYTE))), memory)

    return load
