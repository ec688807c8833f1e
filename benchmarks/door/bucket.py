"""An S3 server on loopback that takes little time itself, for measuring those who write records and images to it.

`python -m benchmarks.door.bucket` prints its port. It knows PUT with If-None-Match and If-Match, GET, LIST by
StartAfter, and DELETE, and keeps objects in memory. It checks no signature: what that costs falls on a server
elsewhere. GET / tells how many PUTs it has taken, and its CPU seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from bisect import bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Stored:
    """An object; its ETag is its MD5, as S3's is."""

    data: bytes
    etag: str
    content_type: str
    written: float


@dataclass
class Bucket:
    """All that was taken, by bucket and key. For one event loop, so that each change is one step."""

    objects: dict[str, Stored] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    puts: int = 0

    def put(self, key: str, data: bytes, fields: Mapping[str, str]) -> Answer:
        there = self.objects.get(key)
        if fields.get("if-none-match") == "*" and there is not None:
            return _refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        wanted = fields.get("if-match")
        if wanted is not None and there is None:
            return _refused(HTTPStatus.NOT_FOUND, "NoSuchKey")
        if wanted is not None and there is not None and there.etag != wanted:
            return _refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        if there is None:
            insort(self.order, key)
        self.objects[key] = Stored(data, etag, fields.get("content-type", ""), time.time())
        self.puts += 1
        return Answer(HTTPStatus.OK, fields={"ETag": etag})

    def get(self, key: str) -> Answer:
        found = self.objects.get(key)
        if found is None:
            return _refused(HTTPStatus.NOT_FOUND, "NoSuchKey")
        fields = {
            "ETag": found.etag,
            "Content-Type": found.content_type,
            "Last-Modified": formatdate(found.written, usegmt=True),
        }
        return Answer(HTTPStatus.OK, found.data, fields)

    def list(self, bucket: str, query: Mapping[str, list[str]]) -> Answer:
        start = f"{bucket}/{query.get('prefix', [''])[0]}"
        after = query.get("start-after", [""])[0]
        most = int(query.get("max-keys", ["1000"])[0])
        begin = bisect_right(self.order, f"{bucket}/{after}") if after else 0
        keys = [key for key in self.order[begin:] if key.startswith(start)]
        listed = "".join(
            f"<Contents><Key>{escape(key.partition('/')[2])}</Key></Contents>"
            for key in keys[:most]
        )
        more = "true" if len(keys) > most else "false"
        return Answer(
            HTTPStatus.OK,
            f"<ListBucketResult><IsTruncated>{more}</IsTruncated>{listed}</ListBucketResult>".encode(),
        )


@dataclass(frozen=True)
class Answer:
    """What goes back."""

    status: HTTPStatus
    body: bytes = b""
    fields: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        fields = {
            "Date": formatdate(usegmt=True),
            "Content-Length": str(len(self.body)),
            **self.fields,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return (
            f"HTTP/1.1 {self.status} {self.status.phrase}\r\n{lines}\r\n".encode("latin-1")
            + self.body
        )


def _refused(status: HTTPStatus, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code></Error>".encode())


class Connection(asyncio.Protocol):
    """One client, whose requests follow each other."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._received = bytearray()
        self._promised = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._take_one():
            pass

    def _take_one(self) -> bool:
        """Answer a request if all of it is there."""
        end = self._received.find(_HEAD_END)
        if end < 0:
            return False
        first, *lines = bytes(self._received[:end]).decode("latin-1").split("\r\n")
        split = (line.partition(":") for line in lines)
        fields = {name.lower(): value.strip() for name, _, value in split}
        whole = end + len(_HEAD_END) + int(fields.get("content-length", "0"))
        if len(self._received) < whole:
            if fields.get("expect") and not self._promised:  # boto3's PUTs wait for it
                self._promised = True
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return False
        body = bytes(self._received[end + len(_HEAD_END) : whole])
        del self._received[:whole]
        self._promised = False
        method, target, _ = first.split(" ")
        self._transport.write(self._answer(method, target, fields, body).encode())
        return True

    def _answer(self, method: str, target: str, fields: Mapping[str, str], body: bytes) -> Answer:
        path, _, query = target.partition("?")
        key = unquote(path).lstrip("/")
        bucket, _, name = key.partition("/")
        match method:
            case "PUT":
                return self._bucket.put(key, body, fields)
            case "GET" if not key:
                told = {"puts": self._bucket.puts, "cpu_seconds": time.process_time()}
                return Answer(HTTPStatus.OK, json.dumps(told).encode())
            case "GET" if not name:
                return self._bucket.list(bucket, parse_qs(query, keep_blank_values=True))
            case "GET":
                return self._bucket.get(key)
            case "DELETE":
                self._bucket.objects.clear()
                self._bucket.order.clear()
                return Answer(HTTPStatus.NO_CONTENT)
            case _:
                return _refused(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")


async def serve() -> None:
    bucket = Bucket()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(bucket), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
