"""Faults that the embedded S3 server can be told to commit, as plain values, and the record it keeps of requests.

Shared by the server and by whoever drives it. A fault stands in for what networks, disks and caches do to objects;
it is never the server's own doing, and a server that was told nothing commits none.
"""

import threading
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

FaultKind = Literal["status", "corrupt", "truncate", "hold"]
_HOLD_LIMIT_S = 120.0


@dataclass(frozen=True)
class Fault:
    """One rule. It applies to requests that match `method`, `bucket` and `key` (shell patterns), `times` times.

    Kinds:
        status: answer `status` (an S3 error document) without looking at the request.
        corrupt: flip every bit of byte `at` of the object in answers that cover it; ETag and length stay as they are.
        truncate: announce the whole length, send the first `at` bytes of the answer's body, close the connection.
        hold: answer only once the faults are cleared (or after two minutes).
    """

    kind: FaultKind
    key: str = "*"
    bucket: str = "*"
    method: str = "GET"
    times: int | None = None
    """How many requests it befalls; None: all of them."""
    skip: int = 0
    """How many matching requests pass unharmed first."""
    status: int = 503
    at: int = 0

    def matches(self, method: str, bucket: str, key: str) -> bool:
        wanted = (self.method, self.bucket, self.key)
        return all(
            fnmatchcase(value, pattern)
            for value, pattern in zip((method, bucket, key), wanted, strict=True)
        )


@dataclass(frozen=True)
class RequestRecord:
    """One request as the server saw it, in the order of the answers."""

    method: str
    bucket: str
    key: str
    query: tuple[str, ...]
    """The names of the query's parameters, without a presigned URL's own."""
    status: int
    access_key_id: str | None
    presigned: bool
    range: str | None
    request_bytes: int
    response_bytes: int


class FaultBook:
    """The rules in force, counted down as they strike. Safe for the server's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._cleared = threading.Event()
        self._held = threading.Event()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self._cleared.set()
            self._cleared, self._held = threading.Event(), threading.Event()

    def strike(self, method: str, bucket: str, key: str) -> Fault | None:
        """The fault that befalls this request, if any (the oldest rule that matches and still has strikes)."""
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.times == 0 or not fault.matches(method, bucket, key):
                    continue
                if fault.skip:
                    self._faults[index] = replace(fault, skip=fault.skip - 1)
                    return None
                if fault.times is not None:
                    self._faults[index] = replace(fault, times=fault.times - 1)
                return fault
        return None

    def hold(self) -> None:
        """Keep the calling thread, that of a request, until the faults are cleared."""
        with self._lock:
            cleared = self._cleared
            self._held.set()
        cleared.wait(_HOLD_LIMIT_S)

    def wait_until_held(self) -> bool:
        """Wait until a request is being held; False when none came."""
        with self._lock:
            held = self._held
        return held.wait(_HOLD_LIMIT_S)


def to_json(value: Fault | RequestRecord) -> dict[str, Any]:
    return asdict(value)
