"""Compiled code in a bucket: what the owner's command makes of the job's model, for engines that start after it.

The weights stay in the job's folder. The bucket is the demo's S3 server on loopback and has no more of the model than
its manifest, which that command reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.generation.contestant import LONGEST, environment, last_line
from benchmarks.generation.model import MODEL_PATH, Job
from benchmarks.generation.ways import NotHereError
from benchmarks.wire.measure import progress
from benchmarks.wire.memory import ROOT

if TYPE_CHECKING:
    from demo.s3 import EmbeddedS3


@dataclass(frozen=True)
class Published:
    """The job of an engine that finds its code in the bucket, and what that code is."""

    job: Job
    about: Mapping[str, Any]  # seconds of making it and its bytes


def publish(job: Job, exits: ExitStack) -> Published:
    """Compile the native size in a process of its own, and publish it to a server that runs until `exits` close.

    Raises `NotHereError`.
    """
    try:
        from demo import stages
        from demo.processes import DemoError
        from demo.s3 import EmbeddedS3, EmbeddedS3Error
    except ImportError as error:
        raise NotHereError(str(error)) from error
    try:
        s3 = exits.enter_context(EmbeddedS3())
        stages.create_buckets(s3)
        publisher, runner = (
            s3.environment(stages.create_keypair(s3, user))
            for user in ("model-publisher", "model-runner")
        )
    except (DemoError, EmbeddedS3Error) as error:
        raise NotHereError(last_line(str(error))) from error
    version = _put_manifest(s3, stages.MODEL_BUCKET, Path(job.folder))
    progress("compiling and publishing the code for this machine …")
    document = _compile(job, version, stages.MODEL_BUCKET, publisher)
    settings = {
        "MODEL_BUCKET_NAME": stages.MODEL_BUCKET,
        # On a card as nobody sets it, and then nothing is ever compiled; a CPU fetches only where it is told to.
        "COMPILE": "auto" if job.device == "cuda" else "on",
    }
    return Published(
        replace(job, settings={**job.settings, **settings}, secrets=runner),
        {name: document[name] for name in ("seconds", "bytes", "sizes", "key")},
    )


def _put_manifest(s3: EmbeddedS3, bucket: str, folder: Path) -> str:
    """Have the bucket name the folder's version as its newest; returns that version."""
    from weights.manifest import LATEST_NAME, MANIFEST_NAME, dump_latest

    manifest = (folder / MANIFEST_NAME).read_bytes()
    version = str(json.loads(manifest)["version"])
    client = s3.client()
    client.put_object(Bucket=bucket, Key=f"{MODEL_PATH}/{version}/{MANIFEST_NAME}", Body=manifest)
    client.put_object(Bucket=bucket, Key=f"{MODEL_PATH}/{LATEST_NAME}", Body=dump_latest(version))
    return version


def _compile(job: Job, version: str, bucket: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """What the owner's command says; it has a folder of its own for all that torch caches."""
    command = [sys.executable, "scripts/compile_model.py", MODEL_PATH, bucket]
    settings = {"MODEL_FOLDER": job.folder, "DEVICE": job.device, "DTYPE": job.dtype}
    try:
        ran = subprocess.run(
            [*command, "--version", version, "--json"],
            cwd=ROOT,
            env={**environment(), **settings, **job.settings, **keys},
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotHereError(f"nothing was published within {LONGEST:.0f} seconds") from error
    if ran.returncode:
        raise NotHereError(f"nothing was published: {last_line(ran.stderr)}")
    document: dict[str, Any] = json.loads(ran.stdout)
    return document
