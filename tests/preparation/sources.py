"""Models in buckets to read from: put there as anybody might, with keypairs that may read one bucket and no more."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo.s3 import EmbeddedS3, Keypair
from preparation import Progress, Request, compare, make_plan, prepare, upload
from weights import Bucket, find_snapshot

# What the published folder has anew: they say what the recipe says.
REWRITTEN = {"model_index.json", "scheduler/scheduler_config.json"}


def put_folder(client: Any, bucket: str, folder: Path, prefix: str) -> None:
    """Upload a folder as any tool would."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())


def keypair(s3: EmbeddedS3, bucket: str, *actions: str) -> Keypair:
    """A keypair that may do this with one bucket, and nothing else."""
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Allow", "Action": list(actions), "Resource": resources}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    return s3.create_user(f"user-{uuid.uuid4().hex[:12]}", policy)


def source_variables(s3: EmbeddedS3, keys: Keypair) -> dict[str, str]:
    """The variables that have a source read with `keys`."""
    return {
        "SOURCE_AWS_ACCESS_KEY_ID": keys.access_key_id,
        "SOURCE_AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
        "SOURCE_AWS_ENDPOINT_URL_S3": s3.endpoint_url,
        "SOURCE_AWS_REGION": "us-east-1",
    }


def published_files(bucket: Bucket, model_path: str) -> Mapping[str, bytes]:
    """Every file of the version that is served, by its path."""
    snapshot = find_snapshot(bucket, model_path)
    return {file.path: bucket.get(file.key, limit=2**30) for file in snapshot.files}


def files_of(folder: Path) -> Mapping[str, bytes]:
    """Every file of a folder, by its path."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def publish_model(folder: Path, bucket: Bucket, model_path: str, work: Path) -> str:
    """Publish a diffusers folder as prepare_model.py does; returns the version."""
    request = Request(str(folder), name=model_path, folder=work)
    quiet = Progress(io.StringIO())
    prepared = prepare(request, make_plan(request), quiet)
    publication = compare(request, prepared, bucket, quiet)
    upload(request, publication, quiet)
    return publication.version
