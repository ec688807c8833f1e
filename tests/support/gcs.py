"""A small Google Cloud Storage on loopback, for tests: the part of its XML API that reading needs, over real HTTP.

It stands in for storage.googleapis.com and oauth2.googleapis.com, which tests must not depend on. It lists in pages
(list-type=2), answers ranges and If-Match, keeps private buckets from callers without a right, checks HMAC signatures
with botocore's own signer, and gives tokens for assertions that a service account's key has signed. Status and codes
are those of https://cloud.google.com/storage/docs/xml-api/reference-status. It is not Google: there is no JSON API, no
upload, no IAM beyond a list of readers, no composite objects, and a token lives until the server ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

PAGE_SIZE = 7  # objects of a listing; small, so that its pagination is used


@dataclass
class GcsObjects:
    """A bucket: its objects by name, and who may read it (`*`: everyone)."""

    readers: set[str]
    contents: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class GcsRequest:
    """What a caller asked for, and who it was taken for; None for nobody."""

    path: str
    query: dict[str, list[str]]
    range: str | None
    caller: str | None
    status: int


class LoopbackGcs:
    """The server. `hmac_keys` are secrets by access ID, which are callers too."""

    def __init__(self) -> None:
        self.buckets: dict[str, GcsObjects] = {}
        self.hmac_keys: dict[str, str] = {}
        self.accounts: dict[str, rsa.RSAPublicKey] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[GcsRequest] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}
        )

    @property
    def host(self) -> str:
        """As STORAGE_EMULATOR_HOST has it."""
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, bucket: str, folder: Path, prefix: str, *, readers: set[str]) -> None:
        """Put a folder's files into a bucket that these callers may read."""
        found = self.buckets.setdefault(bucket, GcsObjects(readers))
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = f"{prefix}/{file.relative_to(folder).as_posix()}"
                found.contents[name] = file.read_bytes()

    def add_account(self, email: str, file: Path) -> Path:
        """Make a service account; its key file is written as the console gives it."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.accounts[email] = key.public_key()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        content = {
            "type": "service_account",
            "project_id": "loopback",
            "private_key_id": secrets.token_hex(20),
            "private_key": pem.decode(),
            "client_email": email,
            "client_id": "1",
            "token_uri": f"http://{self.host}/token",
        }
        file.write_text(json.dumps(content))
        return file


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: LoopbackGcs

    def log_message(self, *_values: object) -> None:
        """The log is `LoopbackGcs.requests`."""

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        email = self._signed_by(form.get("assertion", [""])[0])
        if self.path != "/token" or email is None:
            self._send(HTTPStatus.BAD_REQUEST, json.dumps({"error": "invalid_grant"}).encode())
            return
        token = f"ya29.{secrets.token_urlsafe(16)}"
        self.gcs.tokens[token] = email
        answer = {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, name = unquote(url.path).lstrip("/").partition("/")
        caller, refusal = self._caller()
        found = self.gcs.buckets.get(bucket)
        if refusal is not None:
            self._error(*refusal)
        elif found is None:
            self._error(404, "NoSuchBucket", "The specified bucket does not exist.")
        elif not found.readers & {"*", caller}:
            what = "storage.objects.get" if name else "storage.objects.list"
            self._error(403, "AccessDenied", f"{caller or 'Anonymous caller'} has no {what} access")
        elif not name:
            self._list(bucket, found, parse_qs(url.query))
        elif name not in found.contents:
            self._error(404, "NoSuchKey", "The specified key does not exist.")
        else:
            self._object(found.contents[name])

    def _caller(self) -> tuple[str | None, tuple[int, str, str] | None]:
        """Who asks, or how to refuse; neither for a request that says nothing of it."""
        kind, _, credential = (self.headers.get("Authorization") or "").partition(" ")
        if not kind:
            return None, None
        if kind == "Bearer":
            email = self.gcs.tokens.get(credential)
            refused = (401, "AuthenticationRequired", "Authentication required.")
            return email, None if email else refused
        access_id = credential.partition("Credential=")[2].partition("/")[0]
        secret = self.gcs.hmac_keys.get(access_id)
        if secret is None:
            return None, (403, "InvalidAccessKeyId", "The access ID does not exist.")
        if self._signature_of(access_id, secret) != self._signature(credential):
            return None, (403, "SignatureDoesNotMatch", "The signature does not match.")
        return access_id, None

    def _signature(self, credential: str) -> str:
        return credential.partition("Signature=")[2]

    def _signature_of(self, access_id: str, secret: str) -> str:
        """What botocore's signer makes of the same request."""
        credential = self.headers["Authorization"]
        names = credential.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        region = credential.partition("Credential=")[2].split("/")[2]
        headers = {name: self.headers[name] for name in names}
        request: Any = AWSRequest("GET", f"http://{self.headers['Host']}{self.path}", headers)
        request.context["timestamp"] = self.headers["x-amz-date"]
        signer: Any = S3SigV4Auth(Credentials(access_id, secret), "s3", region)
        text = signer.string_to_sign(request, signer.canonical_request(request))
        return str(signer.signature(text, request))

    def _list(self, bucket: str, found: GcsObjects, query: dict[str, list[str]]) -> None:
        if query.get("list-type") != ["2"]:
            self._error(400, "InvalidArgument", "only list-type=2 is spoken here")
            return
        prefix = query.get("prefix", [""])[0]
        start = int(query.get("continuation-token", ["0"])[0])
        names = sorted(name for name in found.contents if name.startswith(prefix))
        page = names[start : start + PAGE_SIZE]
        entries = "".join(_entry(name, found.contents[name]) for name in page)
        is_last = start + PAGE_SIZE >= len(names)
        following = (
            "" if is_last else f"<NextContinuationToken>{start + PAGE_SIZE}</NextContinuationToken>"
        )
        self._send(
            HTTPStatus.OK,
            (
                "<?xml version='1.0' encoding='UTF-8'?>"
                "<ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
                f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix>"
                f"<IsTruncated>{str(not is_last).lower()}</IsTruncated>{following}{entries}"
                "<EncodingType>url</EncodingType></ListBucketResult>"
            ).encode(),
            {"Content-Type": "application/xml; charset=UTF-8"},
        )

    def _object(self, content: bytes) -> None:
        etag = _etag(content)
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted.strip('"') != etag:
            self._error(412, "PreconditionFailed", "At least one of the pre-conditions failed.")
            return
        headers = {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        status, first, last = HTTPStatus.OK, 0, len(content) - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or last), last)
            if first > last:
                self._error(416, "InvalidRange", "The requested range cannot be satisfied.")
                return
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(status, content[first : last + 1], headers)

    def _signed_by(self, assertion: str) -> str | None:
        """The account whose key has signed this JWT (RS256), if one has."""
        try:
            signed, _, signature = assertion.rpartition(".")
            claims: dict[str, Any] = json.loads(_decoded(signed.partition(".")[2]))
            key = self.gcs.accounts[claims["iss"]]
            key.verify(_decoded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        except (KeyError, ValueError, InvalidSignature):
            return None
        return str(claims["iss"]) if "devstorage.read_only" in claims["scope"] else None

    def _error(self, status: int, code: str, message: str) -> None:
        body = (
            "<?xml version='1.0' encoding='UTF-8'?>"
            f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
        )
        self._send(HTTPStatus(status), body.encode(), {"Content-Type": "application/xml"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization") or ""
        caller = self.gcs.tokens.get(authorization.removeprefix("Bearer "))
        if "Credential=" in authorization:
            caller = authorization.partition("Credential=")[2].partition("/")[0]
        asked = GcsRequest(
            unquote(url.path),
            parse_qs(url.query),
            self.headers.get("Range"),
            caller,
            int(status),
        )
        with self.gcs.lock:
            self.gcs.requests.append(asked)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _entry(name: str, content: bytes) -> str:
    return (
        f"<Contents><Key>{quote(name)}</Key><Generation>1</Generation>"
        f'<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"{_etag(content)}"</ETag>'
        f"<Size>{len(content)}</Size></Contents>"
    )


def _etag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
