"""The reading process: fetches and verifies chunks into a ring that its parent empties.

It runs beside a parent that imports torch, whose imports hold the interpreter for seconds. Measured on two cores, with
1.04 GB over TLS and the imports of torch and diffusers beside it: threads in the same process were done after 2.2 s and
the imports after 9.0, a child after 1.9 and the imports after 8.3.
It imports next to nothing, so that its first request leaves a tenth of a second after its start.

Parent and child speak in lines of JSON over a socket: the parent sends the order, then the numbers of slots that are
free again; the child sends pieces, landed chunks, what it logs, and at the end that it is done or what went wrong.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from s3.endpoint import Endpoint
from s3.signing import Credentials, Keypair, Signer, credentials_of
from weights import errors
from weights.cache import NodeCache
from weights.chunks import Chunk, SnapshotFile
from weights.errors import WeightsError
from weights.fetch import AHEAD_OF_A_CARD, Fetcher
from weights.model_folder import ModelFolder, no_bucket_beside
from weights.objects import ObjectReader
from weights.pace import Pace, first_connections
from weights.ring import Ring, RingSink
from weights.transport import Patience

REPORT_SECONDS = 0.25  # between two reports of the counters


class _NoKeypair:
    """Settings that leave the credentials to the machine: its role, its profile."""

    access_key_id = None
    secret_access_key = None
    session_token = None


class Line:
    """The child's end of the socket. Safe for many threads; a parent that is gone ends the process."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("r", encoding="utf-8")
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)

    def receive(self) -> dict[str, Any] | None:
        line = self._lines.readline()
        return json.loads(line) if line else None


class _Forwarder(logging.Handler):
    """Hands log records on to the parent, whose log this is."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.send(
            kind="log", level=record.levelno, name=record.name, text=record.getMessage()
        )


def main(arguments: list[str]) -> None:
    """`arguments`: the numbers of two inherited descriptors, the socket's and the ring's."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the whole group; the parent decides
    line = Line(socket.socket(fileno=int(arguments[0])))
    logging.getLogger().addHandler(_Forwarder(line))
    logging.getLogger("weights").setLevel(logging.INFO)
    order = line.receive()
    if order is None:
        return  # nothing was there to be read
    ring = Ring(int(arguments[1]), order["slots"])
    files = [SnapshotFile(**_entry(entry)) for entry in order["files"]]
    numbers = {file.path: number for number, file in enumerate(files)}
    try:
        cache = (
            NodeCache(Path(order["cache_folder"]), order["cache_bytes"])
            if order["cache_folder"]
            else None
        )
        folder = ModelFolder(Path(order["folder"])) if order["folder"] else None
        reader = _reader(order)
    except WeightsError as error:
        line.send(kind="failed", **_described(error))
        return

    def on_piece(chunk: Chunk, offset: int, slot: int, count: int) -> None:
        place = [numbers[chunk.file.path], chunk.index, offset]
        line.send(kind="piece", place=place, slot=slot, count=count)

    def on_landed(chunk: Chunk) -> None:
        line.send(
            kind="landed",
            place=[numbers[chunk.file.path], chunk.index],
            counters=fetcher.counters.as_dict(),
        )

    sink = RingSink(ring, on_piece, on_landed)
    fetcher = Fetcher(
        reader,
        files,
        sink,
        pace=Pace(
            order["connections"],
            limit=max(1, ring.slots // 2),
            first=first_connections(folder is None and reader().secure),
        ),
        verify=order["verify"],
        cache=cache,
        folder=folder,
        ahead=AHEAD_OF_A_CARD,
    )
    threading.Thread(target=_listen, args=(line, sink), daemon=True).start()
    fetcher.start()
    while not fetcher.wait(REPORT_SECONDS):
        line.send(kind="counters", counters=fetcher.counters.as_dict())
    # Said before anything is waited for: a hedge nobody needs any more may hang in a connect.
    line.send(kind="counters", counters=fetcher.counters.as_dict())
    if fetcher.error is None:
        line.send(kind="done")
    else:
        line.send(kind="failed", **_described(fetcher.error))
        sink.close()
    fetcher.stop()


def _listen(line: Line, sink: RingSink) -> None:
    while (message := line.receive()) is not None:
        for slot in message["free"]:
            sink.free(slot)
    os._exit(0)  # the parent is gone, or has enough


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    digests = entry["digests"]
    return entry | {"digests": None if digests is None else tuple(digests)}


def _reader(order: dict[str, Any]) -> Callable[[], ObjectReader]:
    """What makes the reader: of plain values alone, or with a folder, where it is hardly ever needed, of settings."""
    if order["folder"]:
        return partial(_reader_beside_a_folder, order["bucket"], Path(order["folder"]))
    reader = _reader_of(order["reader"])
    return lambda: reader


def _reader_beside_a_folder(bucket: dict[str, Any] | None, folder: Path) -> ObjectReader:
    if bucket is None:
        raise no_bucket_beside(folder)
    from weights.bucket import Bucket

    return Bucket.from_plain(bucket).reader


def _reader_of(values: dict[str, Any]) -> ObjectReader:
    keypair = values["credentials"]
    source = (
        credentials_of(_NoKeypair())  # type: ignore[arg-type] # what it asks of settings
        if keypair is None
        else Keypair(Credentials(**keypair))
    )
    return ObjectReader(
        Endpoint(**values["endpoint"]),
        Signer(source, values["region"]),
        values["bucket"],
        Patience(**values["patience"]),
    )


def _described(error: BaseException) -> dict[str, str]:
    """An error as plain values. One that nobody foresaw keeps its type's name, for the log."""
    if isinstance(error, WeightsError):
        name = type(error).__name__
        return {"error": name, "text": str(error), "code": getattr(error, "code", "")}
    return {"error": "", "text": f"{type(error).__name__}: {error}", "code": ""}


def rebuilt(message: dict[str, Any]) -> WeightsError:
    """The error that `_described` described, in the parent."""
    kind = getattr(errors, message["error"], WeightsError)
    if not (isinstance(kind, type) and issubclass(kind, WeightsError)):
        kind = WeightsError
    if issubclass(kind, errors.BucketError):
        return kind(message["text"], message["code"])
    return kind(message["text"])


if __name__ == "__main__":
    main(sys.argv[1:])
