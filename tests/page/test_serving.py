"""The page's files over HTTP: what they are, how they are kept, and what they may do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse

import pytest
from fastapi import FastAPI

from gateway.app import image_origins
from gateway.page import FOLDER, origin_of, page_router
from gateway.settings import load_gateway_settings
from tests.support.asgi import HOST, serving

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "tid_AzureDiamond",
    "AWS_SECRET_ACCESS_KEY": "tsec_hunter2",
    "MODEL_PATH": "ByteDance/SDXL-Lightning",
    "MODEL_BUCKET_NAME": "models",
    "PUBLIC_BUCKET_NAME": "pictures",
    "ALLOW_ANONYMOUS": "1",
}
TIGRIS = {"AWS_ENDPOINT_URL_S3": "https://t3.storage.dev"}
PUBLIC = {"PUBLIC_BASE_URL": "https://images.example.com/cdn"}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = FastAPI()
    app.include_router(page_router(["https://fly.storage.tigris.dev", "https://*.example.com/x"]))
    with serving(app) as port:
        yield port


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    with closing(HTTPConnection(HOST, port, timeout=20)) as connection:
        connection.request(
            method, path, headers={n.replace("_", "-"): v for n, v in headers.items()}
        )
        response = connection.getresponse()
        return response, response.read()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_every_file_has_its_type_and_is_asked_for_anew(port: int, path: str, kind: str) -> None:
    response, body = get(port, path)

    assert (response.status, response.headers["Content-Type"]) == (200, kind)
    assert response.headers["Cache-Control"] == "no-cache"
    assert body == (FOLDER / (path.removeprefix("/page/").strip("/") or "index.html")).read_bytes()
    etag = response.headers["ETag"]
    unchanged, nothing = get(port, path, If_None_Match=f'"other", W/{etag}')
    assert (unchanged.status, nothing, unchanged.headers["ETag"]) == (304, b"", etag)
    changed, _ = get(port, path, If_None_Match='"other"')
    assert changed.status == 200
    head, nothing = get(port, path, method="HEAD")
    assert (head.status, nothing, head.headers["ETag"]) == (200, b"", etag)


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_the_page_may_load_images_from_the_bucket_and_all_else_from_here(
    port: int, path: str
) -> None:
    headers = get(port, path)[0].headers
    policy = dict(
        directive.split(" ", 1) for directive in headers["Content-Security-Policy"].split("; ")
    )

    assert policy["img-src"] == (
        "'self' data: https://fly.storage.tigris.dev https://*.example.com"
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path", ["/page/nothing.js", "/page/../page.py", "/page/..%2Fpage.py", "/page/%2Fetc%2Fpasswd"]
)
def test_other_files_are_not_served(port: int, path: str) -> None:
    assert get(port, path)[0].status == 404


@pytest.mark.parametrize(
    ("environment", "origins"),
    [
        (TIGRIS, ["https://t3.storage.dev", "https://pictures.t3.storage.dev"]),
        ({}, ["https://*.amazonaws.com"]),
    ],
    ids=["endpoint", "amazon"],
)
def test_a_bucket_made_public_still_shows_the_pictures_it_had_before(
    environment: dict[str, str], origins: list[str]
) -> None:
    private = load_gateway_settings(SETTINGS | environment)
    public = load_gateway_settings(SETTINGS | environment | PUBLIC)

    assert image_origins(private) == origins
    assert image_origins(public) == ["https://images.example.com", *origins]


def test_origins() -> None:
    assert (
        origin_of("https://bucket.s3.amazonaws.com/a/b?X-Amz=1")
        == "https://bucket.s3.amazonaws.com"
    )
    assert origin_of("http://[::1]:9000/x") == "http://[::1]:9000"
    assert origin_of("https://user:secret@HOST.example:444") == "https://host.example:444"
    assert origin_of("https://bücher.example") == "https://xn--bcher-kva.example"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "data:x",
        "https://",
        "https://a;b",
        "https://a b",
        "https://a:x",
        "https://a\r\nb;c",
    ],
)
def test_what_is_no_origin_of_images_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="images cannot come from"):
        page_router([url])
