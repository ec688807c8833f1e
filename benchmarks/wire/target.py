"""What every measured process is told: where the model lies and how large it is. Plain values, carried as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MEBIBYTE = 1024 * 1024
REGION = "us-east-1"  # nginx checks no signature; every client wants one to sign with
KEY = "bench"


@dataclass(frozen=True)
class Object:
    """One object of the bucket, its key without the bucket's name."""

    key: str
    size: int


@dataclass(frozen=True)
class Span:
    """A piece of an object: `length` bytes from `start`, which lie at `place` when all objects stand in a row."""

    key: str
    start: int
    length: int
    place: int


@dataclass(frozen=True)
class Target:
    """A published model behind an endpoint. `tensor_bytes` is `weights` without the files' headers."""

    endpoint: str
    bucket: str
    model_path: str
    version: str
    weights: tuple[Object, ...]
    others: tuple[Object, ...]
    tensor_bytes: int
    scratch: str  # an empty folder on a RAM disk
    certificate: str | None = None  # the authority to trust, a PEM file
    tensorizer_key: str | None = None

    @property
    def file_bytes(self) -> int:
        return sum(found.size for found in self.weights)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.endpoint).port or 0

    def spans(self, length: int) -> list[Span]:
        """The weights cut into ranges of at most `length` bytes."""
        spans = []
        place = 0
        for found in self.weights:
            for start in range(0, found.size, length):
                size = min(length, found.size - start)
                spans.append(Span(found.key, start, size, place))
                place += size
        return spans

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Target:
        fields = json.loads(text)
        for name in ("weights", "others"):
            fields[name] = tuple(Object(**found) for found in fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class Held:
    """What a way of reading ends with: how many bytes, and whatever keeps them in memory."""

    count: int
    keep: object = None
    counters: dict[str, Any] | None = None


def empty_folder(path: str) -> Path:
    """The folder, made anew; the one before must have been cleared away."""
    folder = Path(path)
    folder.mkdir(parents=True)
    return folder
