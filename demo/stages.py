"""The stages of the demo, from an empty S3 server to a serving one. Each does one thing and says what it did.

Only what a person following the tutorial would run is run here: the policies of `iam/`, `scripts/prepare_model.py`,
the gateway. What is said to whom and in what order is `__main__`'s.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from demo.processes import Child, DemoError, Signals, free_port, inherited_environment
from demo.s3 import EmbeddedS3, Keypair
from demo.tutorial import fetch
from scripts.fill_iam import fill

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL_BUCKET = "model-storage"
IMAGE_BUCKET = "generated-images"
MODEL_PATH = "demo/small-sdxl-lightning"

_SETUP_TIMEOUT_S = 600
_POLL_S = 0.1


@dataclass(frozen=True)
class Workplace:
    """What every stage needs: a folder of its own for files, and the ways in which a stage can be ended."""

    folder: Path
    signals: Signals
    exits: ExitStack

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Child:
        """Start a child that is stopped with the demo, come what may."""
        with self.signals.deferred():
            child = Child(
                command,
                environment=environment,
                cwd=REPOSITORY,
                log=self.folder / f"{Path(name).name}.log",
            )
            self.exits.callback(child.stop)
        return child

    def run(self, name: str, command: list[str], environment: dict[str, str]) -> str:
        """Run a child to its end and return what it printed.

        Raises:
            DemoError: it failed; with the end of what it printed.
        """
        child = self.start(name, command, environment)
        exit_code = child.wait()
        child.stop()
        if exit_code:
            raise DemoError(f"{name} ended with exit code {exit_code}:\n{child.tail()}")
        return child.log()


def create_buckets(server: EmbeddedS3) -> None:
    """Raises DemoError when the server does not do it."""
    for bucket in (MODEL_BUCKET, IMAGE_BUCKET):
        with _told(f"The bucket {bucket}"):
            server.create_bucket(bucket)


def create_keypair(server: EmbeddedS3, user: str) -> Keypair:
    """A keypair with the rights of `iam/<user>.json`, for the demo's buckets.

    Raises:
        DemoError: the server does not make it.
    """
    policy = json.loads((REPOSITORY / "iam" / f"{user}.json").read_text(encoding="utf-8"))
    filled = fill(policy, model_bucket=MODEL_BUCKET, image_bucket=IMAGE_BUCKET)
    with _told(f"The keypair {user}"):
        return server.create_user(user, filled)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise DemoError(
            f"{what} could not be created on the embedded S3 server: {error}"
        ) from error


def build_model(place: Workplace) -> Path:
    folder = place.folder / "small-sdxl"
    command = [sys.executable, "-m", "demo.small_sdxl", str(folder)]
    place.run("demo.small_sdxl", command, inherited_environment())
    return folder


def publish(place: Workplace, server: EmbeddedS3, keypair: Keypair, model: Path) -> str:
    """Publish with the script of the tutorial; return what it printed."""
    command = [sys.executable, "scripts/prepare_model.py", str(model), MODEL_BUCKET]
    command += ["--name", MODEL_PATH, "--destdir", str(place.folder / "prepared")]
    environment = inherited_environment() | server.environment(keypair)
    return place.run("scripts/prepare_model.py", command, environment)


@dataclass(frozen=True)
class Gateway:
    """A gateway that serves, with Cog's server behind it."""

    process: Child
    address: str


def serve(place: Workplace, server: EmbeddedS3, keypair: Keypair) -> Gateway:
    """Start the gateway with the keypair and the variables of the tutorial, and wait until it is ready.

    Raises:
        DemoError: the server ended, or its setup failed or took too long.
    """
    port = free_port()
    environment = inherited_environment() | server.environment(keypair)
    environment |= {
        "MODEL_PATH": MODEL_PATH,
        "MODEL_BUCKET_NAME": MODEL_BUCKET,
        "PUBLIC_BUCKET_NAME": IMAGE_BUCKET,
        "COG_SETUP_TIMEOUT": str(_SETUP_TIMEOUT_S),
        # On loopback it needs no keys.
        "HOST": "127.0.0.1",
        "PORT": str(port),
    }
    process = place.start("gateway", [sys.executable, "-m", "gateway"], environment)
    address = f"http://127.0.0.1:{port}"
    _wait_until_ready(process, lambda: _status(address))
    return Gateway(process, address)


def _wait_until_ready(process: Child, status: Callable[[], dict[str, Any] | None]) -> None:
    deadline = time.monotonic() + _SETUP_TIMEOUT_S + 30
    while time.monotonic() < deadline:
        if process.exit_code is not None:
            message = f"The gateway ended with exit code {process.exit_code}. Its last lines:"
            raise DemoError(f"{message}\n{process.tail()}")
        now = status() or {}
        if now.get("state") in ("ready", "busy"):
            return
        if now.get("state") == "setup_failed":
            # It would try again, as a server should, and a demo need not.
            raise DemoError(f"The model could not be loaded. {now.get('reason') or process.tail()}")
        time.sleep(_POLL_S)
    raise DemoError(f"The gateway was not ready in time. Its last lines:\n{process.tail()}")


def _status(address: str) -> dict[str, Any] | None:
    try:
        _, body, _ = fetch(f"{address}/status")
        state: dict[str, Any] = json.loads(body)
    except (DemoError, ValueError):
        return None  # not listening yet
    return state
