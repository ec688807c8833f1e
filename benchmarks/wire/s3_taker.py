"""An S3 server on loopback that takes objects as fast as they come, for measuring who sends them.

`python -m benchmarks.wire.s3_taker FOLDER` prints its port. It knows PUT, copies, multipart uploads, HEAD, GET of whole
objects and empty listings; bytes go to files in FOLDER, a RAM disk. It checks neither signatures nor digests, and its
ETags are no digests: what that would cost falls on a server elsewhere, not on the machine that sends. GET / tells what
it has taken, and its CPU seconds.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 1024 * 1024  # bytes taken off the wire at once
METADATA = "x-amz-meta-"
_LISTED_PART = re.compile(rb"<PartNumber>(\d+)</PartNumber>")


@dataclass(frozen=True)
class Stored:
    """An object: its bytes lie in `files`, one after the other."""

    files: tuple[Path, ...]
    size: int
    etag: str
    metadata: tuple[tuple[str, str], ...]


class Store:
    """What was taken so far, and how much that was. Safe for threads: each change of what it holds is one step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[tuple[tuple[str, str], ...], dict[int, Stored]]] = {}
        self.numbers = itertools.count(1)
        self.taken = {"objects": 0, "bytes": 0}
        self._lock = threading.Lock()

    def count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self.taken[name] += number

    def new_file(self) -> Path:
        return self.folder / f"{next(self.numbers)}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: ClassVar[Store]
    _memory = threading.local()

    def do_PUT(self) -> None:
        if source := self.headers.get("x-amz-copy-source"):
            self._copy(unquote(source).lstrip("/"))
            return
        stored = self._take()
        self.store.count(bytes=stored.size)
        if "uploadId" in self._query:
            _, parts = self.store.uploads[self._query["uploadId"][0]]
            parts[int(self._query["partNumber"][0])] = stored
        else:
            self.store.objects[self._key] = stored
            self.store.count(objects=1)
        self._answer(200, b"", ETag=f'"{stored.etag}"')

    def _copy(self, source: str) -> None:
        stored = replace(self.store.objects[source], metadata=self._metadata)
        self.store.objects[self._key] = stored
        etag = f"<ETag>&quot;{stored.etag}&quot;</ETag>"
        self._answer(200, f"<CopyObjectResult>{etag}</CopyObjectResult>".encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "uploads" in self._query:
            upload_id = f"upload-{next(self.store.numbers)}"
            self.store.uploads[upload_id] = (self._metadata, {})
            name, inner = "InitiateMultipartUploadResult", f"<UploadId>{upload_id}</UploadId>"
        else:
            upload_id = self._query["uploadId"][0]
            metadata, parts = self.store.uploads.pop(upload_id)
            chosen = [parts[int(number)] for number in _LISTED_PART.findall(body)]
            stored = Stored(
                tuple(file for part in chosen for file in part.files),
                sum(part.size for part in chosen),
                f"{upload_id}-{len(chosen)}",
                metadata,
            )
            self.store.objects[self._key] = stored
            self.store.count(objects=1)
            name, inner = "CompleteMultipartUploadResult", f'<ETag>"{stored.etag}"</ETag>'
        bucket, _, key = self._key.partition("/")
        inner = f"<Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key>{inner}"
        self._answer(200, f"<{name}>{inner}</{name}>".encode())

    def do_GET(self) -> None:
        if not self._key:
            told = self.store.taken | {"cpu_seconds": time.process_time()}
            self._answer(200, json.dumps(told).encode())
            return
        if "/" not in self._key.rstrip("/") or "uploads" in self._query:
            name = "ListMultipartUploadsResult" if "uploads" in self._query else "ListBucketResult"
            self._answer(200, f"<{name}><IsTruncated>false</IsTruncated></{name}>".encode())
            return
        found = self.store.objects.get(self._key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        self._answer(
            200, b"".join(file.read_bytes() for file in found.files), ETag=f'"{found.etag}"'
        )

    def do_HEAD(self) -> None:
        found = self.store.objects.get(self._key)
        if found is None:
            self._answer(404, b"")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(found.size))
        self.send_header("ETag", f'"{found.etag}"')
        for name, value in found.metadata:
            self.send_header(name, value)
        self.end_headers()

    def do_DELETE(self) -> None:
        """Forget everything: asked for by whoever measures, between two measurements."""
        self.store.objects.clear()
        self.store.uploads.clear()
        for file in self.store.folder.iterdir():
            file.unlink()
        self._answer(204, b"")

    @property
    def _key(self) -> str:
        """Bucket and key."""
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            (name, value)
            for name, value in self.headers.items()
            if name.lower().startswith(METADATA)
        )

    def _take(self) -> Stored:
        if not hasattr(self._memory, "piece"):
            self._memory.piece = memoryview(bytearray(PIECE))
        piece: memoryview = self._memory.piece
        length = left = int(self.headers.get("Content-Length") or 0)
        file = self.store.new_file()
        with file.open("wb", buffering=0) as output:
            while left:
                count = self.rfile.readinto1(piece[: min(left, PIECE)])  # type: ignore[attr-defined]
                if not count:
                    raise ConnectionError("a body ended early")
                output.write(piece[:count])
                left -= count
        return Stored((file,), length, file.name, self._metadata)

    def _answer(self, status: int, body: bytes, **fields: str) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        self.send_header("Content-Length", str(len(body)))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """A line for each request helps nobody."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main(folder: str) -> None:
    Handler.store = Store(Path(folder))
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
