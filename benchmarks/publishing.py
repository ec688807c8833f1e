"""Publishing a model's folder into a bucket, beside s5cmd and boto3 that only copy it, in the same run.

`.venv-bench/bin/python benchmarks/publishing.py` writes benchmarks/results/publishing.md. The bucket is
benchmarks/wire/s3_taker.py on loopback, which stores what it takes on a RAM disk and is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path

# As a script this file's own folder would come first, where `weights` is benchmarks/weights.py and not the room.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.wire.command import RAM_DISK, _count, _size  # noqa: E402
from benchmarks.wire.machine import machine, versions  # noqa: E402
from benchmarks.wire.measure import SEED, environment, progress  # noqa: E402
from benchmarks.wire.memory import ROOT, warm_free_memory  # noqa: E402
from benchmarks.wire.model import BUCKET  # noqa: E402
from benchmarks.wire.target import KEY, Target  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "publishing.md"
MODEL_PATH = "bench/published"
JOBS = 8
PEER = "s5cmd cp"
OURS = "this publisher, a new version"
HASHING = "hashing alone"
AGAIN_READ = "this publisher, nothing changed, no digests remembered"
ONE_CHANGED = "this publisher, one file changed"
CHANGED = "text_encoder/0.safetensors"

# Megabytes, in shards of at most 960.
SHARDS = {
    **{f"unet/{number}.safetensors": 960 for number in range(5)},
    "unet/5.safetensors": 335,
    "text_encoder_2/0.safetensors": 960,
    "text_encoder_2/1.safetensors": 430,
    "text_encoder/0.safetensors": 246,
    "vae/0.safetensors": 167,
}

HEAD = """# Getting a model into a bucket

Written by `.venv-bench/bin/python benchmarks/publishing.py {arguments}` on {date}.
{machine}; {versions}.

A folder of {size} with the files of SDXL-Lightning as it is published (random bytes, all sizes by the same factor
smaller) on a RAM disk goes to an S3 server on loopback (`benchmarks/wire/s3_taker.py`), which stores what it takes on
the same RAM disk and checks no digests: sender and server share the cores. Each measurement is a fresh process, timed
from the call, after its imports, to the last answer; s5cmd's own start is part of its time. A new version and the
copies go to an empty bucket, the other ways to one that holds the model. This publisher hashes the folder (SHA-256 of
every file, BLAKE3 of every 16 MiB) unless it remembers its digests, and of files with the BLAKE3s of the served version
makes no others; it signs each part with its SHA-256, compares it with its BLAKE3 as it leaves, and writes manifest and
latest.json. The others compare nothing, and s5cmd signs each part with its SHA-256 and sends its MD5 along. Every round
runs all ways in a new order; all figures are medians. What else ran on the machine when this began had a load of
{load}: with much of that, only CPU seconds compare.

| way | seconds | min to max | times {peer} | sender's CPU s | times {peer} | server's CPU s | objects sent | MB sent |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


@dataclass(frozen=True)
class Measured:
    """One run: seconds by the clock, CPU seconds of the sender and of the server, and what the server has taken."""

    seconds: float
    sender: float
    server: float
    objects: int
    bytes: int


def write_model(folder: Path, size: int) -> int:
    """A folder of about `size` bytes of weights, laid out as SDXL-Lightning; returns how many there are."""
    share = size / sum(SHARDS.values())
    for name, length in SHARDS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(int(length * share)))
    return sum((folder / name).stat().st_size for name in SHARDS)


def ours(folder: Path, endpoint: str, *, remember: bool) -> Callable[[], None]:
    """Plan and publish, as preparation.compare and upload do."""
    from settings import StorageSettings
    from weights import Bucket, plan_publication, publish
    from weights.remembered import Remembered

    settings = StorageSettings.model_validate(
        {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_REGION": "auto",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
        }
    )
    bucket = Bucket(settings, BUCKET, connections=2 * JOBS)
    _ = bucket.client
    memory = folder.parent / "digests.json"

    def run() -> None:
        publish(
            plan_publication(
                folder,
                bucket,
                MODEL_PATH,
                {},
                remembered=Remembered(memory) if remember else None,
                jobs=JOBS,
            ),
            jobs=JOBS,
        )

    return run


def ours_new(folder: Path, endpoint: str) -> Callable[[], None]:
    return ours(folder, endpoint, remember=False)


def ours_remembered(folder: Path, endpoint: str) -> Callable[[], None]:
    from weights.folder import hash_folder
    from weights.remembered import Remembered

    hash_folder(folder, jobs=JOBS, remembered=Remembered(folder.parent / "digests.json"))
    return ours(folder, endpoint, remember=True)


def ours_again(folder: Path, endpoint: str) -> Callable[[], None]:
    run = ours(folder, endpoint, remember=True)
    run()
    return run


def ours_one_changed(folder: Path, endpoint: str) -> Callable[[], None]:
    run = ours_again(folder, endpoint)
    with (folder / CHANGED).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    return run


def ours_again_read(folder: Path, endpoint: str) -> Callable[[], None]:
    run = ours(folder, endpoint, remember=False)
    run()
    return run


def hashing(folder: Path, _endpoint: str) -> Callable[[], None]:
    from weights.folder import hash_folder

    return lambda: hash_folder(folder, jobs=JOBS) and None


def s5cmd(folder: Path, endpoint: str) -> Callable[[], None]:
    """With its own defaults: 256 workers, 5 parts of 50 MiB at once of each file."""
    from benchmarks.wire.peers.s5cmd_copy import _program

    command = [str(_program()), "--endpoint-url", endpoint, "cp", f"{folder}/"]
    command.append(f"s3://{BUCKET}/{MODEL_PATH}/copied/")
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL) and None


def boto(folder: Path, endpoint: str) -> Callable[[], None]:
    """`upload_file` of one file after another, with its own defaults: 10 threads, parts of 8 MiB."""
    import boto3
    from botocore.config import Config

    s3 = boto3.client("s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]

    def run() -> None:
        for file in files:
            s3.upload_file(str(file), BUCKET, f"{MODEL_PATH}/copied/{file.relative_to(folder)}")

    return run


WAYS: dict[str, Callable[[Path, str], Callable[[], None]]] = {
    OURS: ours_new,
    "this publisher, a new version whose digests are remembered": ours_remembered,
    PEER: s5cmd,
    "boto3 upload_file": boto,
    HASHING: hashing,
    AGAIN_READ: ours_again_read,
    "this publisher, nothing changed": ours_again,
    ONE_CHANGED: ours_one_changed,
}


def run_one(way: str, folder: Path, endpoint: str) -> None:
    """In the measured process: everything up to the call, then wait for the word, then the call."""
    call = WAYS[way](folder, endpoint)
    print("ready", flush=True)
    sys.stdin.readline()
    start, used = time.perf_counter(), _cpu_seconds()
    call()
    print(json.dumps([time.perf_counter() - start, _cpu_seconds() - used]), flush=True)


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


@contextmanager
def taker(folder: Path) -> Iterator[str]:
    """The server, storing into `folder`; yields its endpoint."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.wire.s3_taker", folder],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - for the type checker
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def ask(endpoint: str, method: str) -> bytes:
    """What the server tells whoever measures: on GET what it has taken; on DELETE it forgets its objects."""
    connection = HTTPConnection(endpoint.removeprefix("http://"))
    connection.request(method, "/")
    answer = connection.getresponse().read()
    connection.close()
    return answer


def measure(way: str, folder: Path, endpoint: str, size: int) -> Measured:
    """One run, over warm memory and a bucket that was empty when its process began."""
    ask(endpoint, "DELETE")
    (folder.parent / "digests.json").unlink(missing_ok=True)
    target = Target(endpoint, BUCKET, MODEL_PATH, "", (), (), 0, "")
    with subprocess.Popen(
        [sys.executable, __file__, "--one", way, str(folder), endpoint],
        env=environment(target),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        process.stdout.readline()
        warm_free_memory(3 * size)
        before = json.loads(ask(endpoint, "GET"))
        process.stdin.write("\n")
        process.stdin.flush()
        seconds, cpu_seconds = json.loads(process.stdout.readline())
        after = json.loads(ask(endpoint, "GET"))
    taken = {name: after[name] - before[name] for name in after}
    return Measured(seconds, cpu_seconds, taken["cpu_seconds"], taken["objects"], taken["bytes"])


def report(found: dict[str, list[Measured]], size: int, arguments: str, load: float) -> str:
    lines = [
        HEAD.format(
            arguments=arguments,
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            machine=machine(),
            versions=versions(),
            size=f"{size / 1e9:.2f} GB",
            peer=PEER,
            load=f"{load:.1f}",
        ).rstrip("\n")
    ]
    medians = {
        way: Measured(
            *(statistics.median(values) for values in zip(*map(astuple, runs), strict=True))
        )
        for way, runs in found.items()
    }
    peer = medians[PEER]
    for way, runs in found.items():
        one = medians[way]
        seconds = [run.seconds for run in runs]
        lines.append(
            f"| {way} | {one.seconds:.2f} | {min(seconds):.2f} to {max(seconds):.2f} "
            f"| {one.seconds / peer.seconds:.2f} | {one.sender:.2f} | {one.sender / peer.sender:.2f} "
            f"| {one.server:.2f} | {one.objects:.0f} | {one.bytes / 1e6:.0f} |"
        )
    ours, again, changed = medians[OURS], medians[AGAIN_READ], medians[ONE_CHANGED]
    lines.append(f"""
A new version, hashing included, takes {ours.seconds / peer.seconds:.2f} times as long as {PEER}, and
{ours.sender / peer.sender:.2f} times its CPU seconds. With nothing changed and no digests remembered it takes
{again.seconds / medians[HASHING].seconds:.2f} times as long as hashing alone, and sends {again.objects:.0f} objects.
With one file changed it sends that, the manifest and latest.json: {changed.objects:.0f} objects.""")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        way, folder, endpoint = sys.argv[2:]
        run_one(way, Path(folder), endpoint)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=_count, default=5, help="default: %(default)s")
    parser.add_argument("--size", type=_size, default="1GB", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    order = random.Random(SEED)
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=RAM_DISK) as place:
        root = Path(place)
        folder = root / "model"
        size = write_model(folder, options.size)
        with taker(root / "taken") as endpoint:
            for number in range(options.rounds):
                for way in order.sample(sorted(WAYS), len(WAYS)):
                    found[way].append(measure(way, folder, endpoint, size))
                    seconds = found[way][-1].seconds
                    progress(f"[round {number + 1} of {options.rounds}] {way}: {seconds:.2f} s")
    text = report(found, size, f"--size {options.size / 1e6:.0f}MB --rounds {options.rounds}", load)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
