"""The page at `/`: its files as they lie in gateway/page, and the headers that keep it to itself.

What the page does with the gateway's HTTP interface is in its scripts; nothing here knows of predictions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, Request, Response

FOLDER: Final = Path(__file__).with_name("page")
INDEX: Final = "index.html"
# Said here and not guessed: the system's table of types differs from machine to machine.
TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    headers: Mapping[str, str]
    etag: str


def page_router(image_origins: Sequence[str] = ()) -> APIRouter:
    """Routes of the page and its files; they need no key.

    `image_origins` are URLs of the servers that images come from (of each, scheme, host and port count; a host may
    begin with `*.`). Images from elsewhere are not shown. Raises ValueError for what is no such URL.
    """
    shared = _security_headers(image_origins)
    files = {path.name: _read(path, shared) for path in FOLDER.iterdir() if path.suffix in TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _answer(request, files[INDEX])

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"The page has no file {name[:80]!r}.")
        return _answer(request, files[name])

    return router


def _read(path: Path, shared: Mapping[str, str]) -> _File:
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    # Asked for anew each time and answered with 304: a new release is never mixed with an old one's files.
    headers = {"Content-Type": TYPES[path.suffix], "ETag": etag, "Cache-Control": "no-cache"}
    return _File(body, {**headers, **shared}, etag)


def _answer(request: Request, file: _File) -> Response:
    known = (
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    )
    if any(tag in (file.etag, "*") for tag in known):
        headers = {name: value for name, value in file.headers.items() if name != "Content-Type"}
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=dict(file.headers))


def _security_headers(image_origins: Sequence[str]) -> dict[str, str]:
    images = " ".join(["'self'", "data:", *dict.fromkeys(map(origin_of, image_origins))])
    policy = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": images,
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # and none is made: nothing here writes HTML
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, as a Content-Security-Policy names them."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"images cannot come from {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not host or set(host) & set(" ;,'\"\\"):
        raise ValueError(
            f"images cannot come from {url!r}: give a URL such as https://fly.storage.tigris.dev"
        )
    host = (
        f"[{host}]" if ":" in host else host.encode("idna").decode() if not host.isascii() else host
    )
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}"
