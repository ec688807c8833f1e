"""Compiled code in a bucket: what the owner's command makes of the job's model, for engines that start after it.

The weights stay in the job's folder. The bucket is the demo's S3 server on loopback and has no more of the model than
its manifest, which that command reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmarks.generation.contestant import LONGEST, environment, last_line, uninterrupted
from benchmarks.generation.model import MODEL_PATH, Job
from benchmarks.generation.ways import PUBLISHED, NotHereError
from benchmarks.wire.measure import progress
from benchmarks.wire.memory import ROOT

if TYPE_CHECKING:
    from demo.s3 import EmbeddedS3


@dataclass(frozen=True)
class Published:
    """The job of an engine that finds its code in the bucket, and what that code is."""

    job: Job
    about: Mapping[str, Any]  # seconds of making it and its bytes


class Publishing:
    """The owner's command at work; it has a folder of its own for all that torch caches."""

    def __init__(
        self,
        job: Job,
        version: str,
        bucket: str,
        publisher: Mapping[str, str],
        runner: Mapping[str, str],
    ) -> None:
        self._job = job
        self._bucket = bucket
        self._runner = runner
        # Files and not pipes: they are whole when the command has ended, whoever else still holds them.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # Its own is left behind where it is killed.
        self._temporary = tempfile.mkdtemp(prefix="bench-published-")
        settings = {"MODEL_FOLDER": job.folder, "DEVICE": job.device, "DTYPE": job.dtype}
        command = [sys.executable, "scripts/compile_model.py", MODEL_PATH, bucket]
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--version", version, "--json"],
            cwd=ROOT,
            env=environment()
            | settings
            | dict(job.settings)
            | dict(publisher)
            | {"TMPDIR": self._temporary},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._errors,
        )

    def published(self) -> Published:
        """Wait for it. Raises `NotHereError`."""
        try:
            status = self._process.wait(LONGEST)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise NotHereError(f"nothing was published within {LONGEST:.0f} seconds") from error
        if status:
            raise NotHereError(f"nothing was published: {last_line(_text(self._errors))}")
        document: dict[str, Any] = json.loads(_text(self._said))
        progress(f"{PUBLISHED}: there after {time.monotonic() - self._started:.0f} s")
        settings = {
            "MODEL_BUCKET_NAME": self._bucket,
            # On a card as nobody sets it, and then nothing is ever compiled; a CPU fetches only where it is told to.
            "COMPILE": "auto" if self._job.device == "cuda" else "on",
        }
        return Published(
            replace(self._job, settings={**self._job.settings, **settings}, secrets=self._runner),
            {name: document[name] for name in ("seconds", "bytes", "sizes", "key")},
        )

    def kill(self) -> None:
        """Whoever waits for it in another thread gets an error; nothing is tidied up yet."""
        self._process.kill()

    def end(self) -> None:
        self.kill()
        self._process.wait()
        self._said.close()
        self._errors.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def publish(job: Job, exits: ExitStack) -> Publishing:
    """Start to compile the native size in a process of its own, for a server that runs until `exits` close.

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
    with uninterrupted():
        publishing = Publishing(job, version, stages.MODEL_BUCKET, publisher, runner)
        exits.callback(publishing.end)
    return publishing


def _put_manifest(s3: EmbeddedS3, bucket: str, folder: Path) -> str:
    """Have the bucket name the folder's version as its newest; returns that version."""
    from weights.manifest import LATEST_NAME, MANIFEST_NAME, dump_latest

    manifest = (folder / MANIFEST_NAME).read_bytes()
    version = str(json.loads(manifest)["version"])
    client = s3.client()
    client.put_object(Bucket=bucket, Key=f"{MODEL_PATH}/{version}/{MANIFEST_NAME}", Body=manifest)
    client.put_object(Bucket=bucket, Key=f"{MODEL_PATH}/{LATEST_NAME}", Body=dump_latest(version))
    return version


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
