"""The gate in front of the embedded server's moto: presigned URLs, the record of requests, and faults on demand.

A WSGI middleware. It lets moto decide everything about buckets, objects and rights; what it adds is listed above, and
reached by its owner alone under CONTROL_PATH with the server's control token.
"""

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote

from demo.s3_faults import Fault, FaultBook, RequestRecord, to_json
from demo.s3_presigned import Refusal, error_document, is_presigned, sign_by_header

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WSGIApp = Callable[[Environ, StartResponse], Iterable[bytes]]

CONTROL_PATH = "/_embedded_s3/"
TOKEN_HEADER = "X-Control-Token"
_STATUS_LINES = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found"}
_FAULT_CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied", 404: "NoSuchKey"}


class Gate:
    """Wraps `app`; `secret_of` gives the secret of an access key id, or None."""

    def __init__(
        self, app: WSGIApp, *, control_token: str, secret_of: Callable[[str], str | None]
    ) -> None:
        self._app = app
        self._control_token = control_token
        self._secret_of = secret_of
        self._faults = FaultBook()
        self._lock = threading.Lock()
        self._records: list[RequestRecord] = []
        self._clock_offset = timedelta()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if _raw_path(environ).startswith(CONTROL_PATH):
            return self._control(environ, start_response)
        return self._serve(environ, start_response)

    def _serve(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method: str = environ["REQUEST_METHOD"]
        bucket, key = _bucket_and_key(environ)
        presigned = is_presigned(environ.get("QUERY_STRING", ""))
        fault = self._faults.strike(method, bucket, key)
        answer = _Answer()
        try:
            _read_body(environ)
            if fault and fault.kind == "status":
                code = _FAULT_CODES.get(fault.status, "InternalError")
                raise Refusal(fault.status, code, "A fault that the test asked for.")
            if fault and fault.kind == "hold":
                self._faults.hold()
            self._admit(environ, presigned)
            body = self._app(environ, answer.start)
        except Refusal as refusal:
            body = answer.refuse(refusal, environ)
        self._record(environ, answer, (method, bucket, key), presigned)
        start_response(answer.status_line, answer.headers)
        if fault and answer.status in (200, 206):
            return _spoil(body, fault, answer.first_byte)
        return body

    def _admit(self, environ: Environ, presigned: bool) -> None:
        """Let a header-signed request pass, turn a presigned one into such, refuse any other."""
        if presigned:
            now = datetime.now(UTC) + self._clock_offset
            url = f"http://{environ['HTTP_HOST']}{environ['REQUEST_URI']}"
            method = environ["REQUEST_METHOD"]
            signed = sign_by_header(method, url, _headers(environ), self._secret_of, now)
            path = _raw_path(environ)
            target = f"{path}?{signed.query}" if signed.query else path
            environ |= {"QUERY_STRING": signed.query, "REQUEST_URI": target, "RAW_URI": target}
            environ |= {
                f"HTTP_{name.upper().replace('-', '_')}": value
                for name, value in signed.headers.items()
            }
        elif not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4-HMAC-SHA256 "):
            message = "Sign the request (Signature Version 4): nothing here is public."
            raise Refusal(403, "AccessDenied", message)

    def _record(
        self, environ: Environ, answer: "_Answer", asked: tuple[str, str, str], presigned: bool
    ) -> None:
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        _, _, credential = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")
        record = RequestRecord(
            *asked,
            query=tuple(name for name, _ in query if not name.startswith("X-Amz-")),
            status=answer.status,
            access_key_id=credential.split("/")[0] or None,
            presigned=presigned,
            range=environ.get("HTTP_RANGE"),
            request_bytes=int(environ.get("CONTENT_LENGTH") or 0),
            response_bytes=answer.content_length,
        )
        with self._lock:
            self._records.append(record)

    def _control(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if _headers(environ).get(TOKEN_HEADER.lower()) != self._control_token:
            return _reply(start_response, 403, {"error": "wrong control token"})
        match environ["REQUEST_METHOD"], _raw_path(environ).removeprefix(CONTROL_PATH):
            case "GET", "requests":
                with self._lock:
                    records = list(self._records)
                return _reply(start_response, 200, [to_json(record) for record in records])
            case "DELETE", "requests":
                with self._lock:
                    self._records.clear()
            case "POST", "faults":
                self._faults.add(Fault(**_json_body(environ)))
            case "DELETE", "faults":
                self._faults.clear()
            case "GET", "held":
                return _reply(start_response, 200, self._faults.wait_until_held())
            case "POST", "clock":
                self._clock_offset = timedelta(seconds=_json_body(environ)["offset"])
            case _:
                return _reply(start_response, 404, {"error": "no such control"})
        return _reply(start_response, 200, {})


class _Answer:
    """What the application answered, kept back until it is recorded."""

    def __init__(self) -> None:
        self.status_line = ""
        self.headers: list[tuple[str, str]] = []

    def start(self, status_line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if exc_info:
            raise exc_info[1]
        self.status_line, self.headers = status_line, headers
        return _no_write

    def refuse(self, refusal: Refusal, environ: Environ) -> list[bytes]:
        body = error_document(refusal, unquote(_raw_path(environ)))
        self.status_line = f"{refusal.status} {_STATUS_LINES.get(refusal.status, refusal.code)}"
        self.headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    @property
    def status(self) -> int:
        return int(self.status_line.split()[0])

    @property
    def content_length(self) -> int:
        return int(self._header("content-length") or 0)

    @property
    def first_byte(self) -> int:
        """Where in the object the body begins."""
        served = self._header("content-range").removeprefix("bytes ")
        return int(served.partition("-")[0]) if served else 0

    def _header(self, wanted: str) -> str:
        return next((value for name, value in self.headers if name.lower() == wanted), "")


def _read_body(environ: Environ) -> None:
    """Take the whole body off the wire at once: a refusal may then come before it was looked at, and werkzeug would
    otherwise gather it in steps of 64 KiB, at a quarter of the speed."""
    # A chunked body tells its end itself; any other is as long as it says.
    length = -1 if "wsgi.input_terminated" in environ else int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length)
    if len(body) < length:  # the client is gone; moto would store what there is
        raise Refusal(400, "IncompleteBody", f"{length} bytes were announced, {len(body)} came.")
    environ["wsgi.input"] = io.BytesIO(body)
    environ["wsgi.input_terminated"] = True


def _no_write(_: bytes) -> None:
    raise NotImplementedError("the application is expected to return its body")


def _spoil(body: Iterable[bytes], fault: Fault, first_byte: int) -> Iterator[bytes]:
    """The body, with the fault's damage done to it."""
    passed = 0
    for piece in body:
        if fault.kind == "truncate" and passed + len(piece) > fault.at:
            yield piece[: fault.at - passed]
            return  # every answer closes its connection, so the client sees the body end early
        wrong = fault.at - first_byte - passed
        if fault.kind == "corrupt" and 0 <= wrong < len(piece):
            yield piece[:wrong] + bytes([piece[wrong] ^ 0xFF]) + piece[wrong + 1 :]
        else:
            yield piece
        passed += len(piece)


def _raw_path(environ: Environ) -> str:
    path, _, _ = str(environ["REQUEST_URI"]).partition("?")
    return path


def _bucket_and_key(environ: Environ) -> tuple[str, str]:
    bucket, _, key = unquote(_raw_path(environ)).lstrip("/").partition("/")
    return bucket, key


def _headers(environ: Environ) -> dict[str, str]:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    return headers


def _json_body(environ: Environ) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    )
    return content


def _reply(start_response: StartResponse, status: int, content: Any) -> list[bytes]:
    body = json.dumps(content).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response(f"{status} {_STATUS_LINES[status]}", headers)
    return [body]
