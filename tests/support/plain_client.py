"""A client of no sophistication, and the bucket that it asks for a model, for tests of the servers themselves."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import random
from dataclasses import dataclass
from pathlib import Path

from tests.support.object_server import LoopbackServer

MODEL = random.Random(7).randbytes(300_000)
ETAG = f'"{hashlib.md5(MODEL, usedforsecurity=False).hexdigest()}"'
MODEL_PATH = "/models/sdxl/unet.safetensors"
CONFIG_PATH = "/models/sdxl/config.json"
MIDDLE = 150_001
RANGE = {"Range": "bytes=1000-1999"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(
    server: LoopbackServer,
    path: str = MODEL_PATH,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    body: bytes | None = None,
) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, 30)) as client:
        return ask_again(client, path, headers, method, body)


def ask_again(
    client: http.client.HTTPConnection,
    path: str = MODEL_PATH,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    body: bytes | None = None,
) -> Answer:
    client.request(method, path, body, headers or {})
    response = client.getresponse()
    return Answer(response.status, response.headers, response.read())


def write_bucket(root: Path) -> Path:
    """A folder for `ObjectServer` with one bucket, of a model and its configuration."""
    (root / "models/sdxl").mkdir(parents=True)
    (root / MODEL_PATH[1:]).write_bytes(MODEL)
    (root / CONFIG_PATH[1:]).write_bytes(b"{}")
    return root
