"""Those that are measured: the gateway, and the Cog server behind it; with the bucket they write to."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.wire.memory import ROOT
from demo import stages
from demo.processes import Child, Signals, free_port, inherited_environment
from demo.s3 import EmbeddedS3
from demo.small_sdxl import write_small_sdxl
from scripts.generate_schema import generate

SLOTS = 16
READY_WITHIN_S = 300.0
POLL_S = 0.05
IMAGES = "generated-images"
KEY = "bench"
CARD = Path(__file__).with_name("card.py")


@dataclass(frozen=True)
class Server:
    """One that answers predictions: its way, and where it listens."""

    name: str
    port: int
    process: Child


@contextmanager
def bucket() -> Iterator[int]:
    """The S3 server; yields its port."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.door.bucket"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - for the type checker
            yield int(process.stdout.readline())
        finally:
            process.kill()


def card_folder(folder: Path) -> Path:
    """A folder as the repository's, whose runner has a clock for a card."""
    (folder / ".cog").mkdir(parents=True)
    shutil.copy(CARD, folder / "predict.py")
    schema = generate(CARD.read_text(encoding="utf-8"))
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(schema), encoding="utf-8")
    return folder


def environment(bucket_port: int, more: Mapping[str, str]) -> dict[str, str]:
    here = str(Path(sys.executable).parent)
    inherited = inherited_environment()
    return {
        **inherited,
        "PATH": os.pathsep.join([here, inherited.get("PATH", os.defpath)]),
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{bucket_port}",
        "AWS_REGION": "auto",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "MODEL_BUCKET_NAME": "model-storage",
        "MODEL_PATH": "bench/model",
        "PUBLIC_BUCKET_NAME": IMAGES,
        "COG_MAX_CONCURRENCY": str(SLOTS),
        "COG_PREDICT_TYPE_STUB": "predict.py:Runner",
        **more,
    }


def start(cwd: Path, variables: Mapping[str, str], logs: Path, exits: ExitStack) -> Server:
    """The gateway; it ends with `exits`."""
    port = free_port()
    process = Child(
        [sys.executable, "-m", "gateway"],
        environment={**variables, "HOST": "127.0.0.1", "PORT": str(port)},
        cwd=cwd,
        log=logs / f"{port}.log",
    )
    exits.callback(process.stop)
    return Server("the gateway", port, process)


def behind(gateway: Server) -> Server:
    """Cog's server that the gateway has started, to be asked past it.

    A second one beside it would have a process of its own, and of two alike one makes pictures 10 % faster than the
    other for as long as it lives.
    """
    children = psutil.Process(gateway.process.pid).children()
    (cog,) = (child for child in children if "cog.server.http" in child.cmdline())
    (port,) = {
        connection.laddr.port
        for connection in cog.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    return Server("Cog's server", port, gateway.process)


def wait_until_ready(server: Server) -> None:
    """Raises RuntimeError with its last lines where it does not become ready."""
    ends = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < ends and server.process.exit_code is None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        try:
            connection.request("GET", "/health-check")
            status = json.loads(connection.getresponse().read()).get("status")
            if status == "READY":
                return
            if status == "SETUP_FAILED":
                break
        except (OSError, http.client.HTTPException, ValueError):
            pass
        finally:
            connection.close()
        time.sleep(POLL_S)
    raise RuntimeError(f"{server.name} did not become ready:\n{server.process.tail()}")


def small_model(folder: Path) -> dict[str, str]:
    """The demo's small SDXL, published and pulled into a folder: what says to the product where it is."""
    pulled = folder / "pulled"
    with ExitStack() as exits:
        place = stages.Workplace(folder, Signals(), exits)
        s3 = exits.enter_context(EmbeddedS3())
        stages.create_buckets(s3)
        keypair = stages.create_keypair(s3, "model-publisher")
        stages.publish(place, s3, keypair, write_small_sdxl(folder / "small-sdxl"))
        command = [sys.executable, "-m", "weights", "pull", stages.MODEL_PATH]
        command += ["--bucket", stages.MODEL_BUCKET, "--to", str(pulled)]
        place.run("weights pull", command, inherited_environment() | s3.environment())
    return {
        "MODEL_PATH": stages.MODEL_PATH,
        "MODEL_FOLDER": str(pulled),
        "OMP_NUM_THREADS": "1",
    }


def cpu_seconds(server: Server) -> float:
    """Of the server's own process, without those it has started."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
