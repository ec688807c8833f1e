"""The object server answers a plain client as S3 would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.object_server import ObjectServer, s3_error
from tests.support.plain_client import (
    CONFIG_PATH,
    ETAG,
    MODEL,
    MODEL_PATH,
    RANGE,
    ask,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize(
    ("asked", "first", "length"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=299999-", 299_999, 1),
        ("bytes=-5", 299_995, 5),
        ("bytes=-900000", 0, 300_000),
        ("bytes=299990-900000", 299_990, 10),
        ("bytes=1-200000", 1, 200_000),
    ],
)
def test_a_range_is_served(server: ObjectServer, asked: str, first: int, length: int) -> None:
    answer = ask(server, headers={"Range": asked})

    assert (answer.status, answer.body) == (206, MODEL[first : first + length])
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + length - 1}/300000"


@pytest.mark.parametrize("asked", ["bytes=300000-", "bytes=-0"])
def test_a_range_outside_the_object_is_refused(server: ObjectServer, asked: str) -> None:
    answer = ask(server, headers={"Range": asked})

    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */300000")
    assert b"<Code>InvalidRange</Code>" in answer.body


@pytest.mark.parametrize("asked", ["bytes=5-3", "bytes=-", "bytes=0-1,4-5", "lines=1-2"])
def test_what_is_no_single_range_is_ignored(server: ObjectServer, asked: str) -> None:
    assert ask(server, headers={"Range": asked}).status == 200


def test_conditions_are_held(server: ObjectServer) -> None:
    assert ask(server).headers["ETag"] == ETAG
    assert ask(server, headers={"If-Match": f'"a", {ETAG}'}).status == 200
    assert ask(server, headers={"If-Match": '"a"'}).status == 412
    assert ask(server, headers={"If-None-Match": ETAG}).status == 304
    assert ask(server, headers={"If-None-Match": '"a"'}).status == 200


def test_a_missing_object_is_s3s_error(server: ObjectServer) -> None:
    answer = ask(server, "/models/none")

    assert (answer.status, answer.headers["Content-Type"]) == (404, "application/xml")
    assert b"<Code>NoSuchKey</Code>" in answer.body
    assert b"<Code>NoSuchBucket</Code>" in ask(server, "/none/none").body
    for outside in ("/models/../../etc/passwd", "/../models/sdxl/config.json", "/models/%2e%2e/x"):
        assert ask(server, outside).status == 404
    assert ask(server, "/models/none", method="HEAD").body == b""


def test_an_overwritten_object_has_another_etag(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    place = tmp_path / "models/a"
    place.write_bytes(b"one")
    with ObjectServer(tmp_path) as server:
        first = ask(server, "/models/a")
        (tmp_path / "new").write_bytes(b"two")
        (tmp_path / "new").replace(place)
        second = ask(server, "/models/a")

    assert (first.body, second.body) == (b"one", b"two")
    assert first.headers["ETag"] != second.headers["ETag"]


def test_requests_and_bytes_are_counted_per_key(server: ObjectServer) -> None:
    ask(server)
    ask(server, headers=RANGE)
    ask(server, CONFIG_PATH)
    ask(server, CONFIG_PATH, method="HEAD")

    assert [request.status for request in server.requests("sdxl/unet.safetensors")] == [200, 206]
    assert server.bytes_sent("sdxl/unet.safetensors") == 301_000
    assert (server.bytes_sent("sdxl/config.json"), server.bytes_sent()) == (2, 301_002)


def test_a_lax_server_is_as_lax_as_it_is_told(folder: Path) -> None:
    with ObjectServer(folder, ignore_range=True) as server:
        answer = ask(server, headers=RANGE)
        assert (answer.status, answer.body) == (200, MODEL)
    with ObjectServer(folder, range_as_200=True) as server:
        answer = ask(server, headers=RANGE)
        assert (answer.status, answer.body) == (200, MODEL[1000:2000])
        assert answer.headers["Content-Range"] == f"bytes 1000-1999/{len(MODEL)}"
    with ObjectServer(folder, ignore_conditions=True) as server:
        assert ask(server, headers={"If-Match": '"other"'}).status == 200


def test_a_bucket_can_be_required_in_the_host(folder: Path) -> None:
    with ObjectServer(folder, require_bucket_host=True) as server:
        host = {"Host": f"models.localhost:{server.port}"}
        assert ask(server, MODEL_PATH.removeprefix("/models"), host).body == MODEL
        refused = ask(server)
        assert (refused.status, b"<Code>InvalidRequest</Code>" in refused.body) == (400, True)


def test_an_error_document_is_xml_even_for_an_odd_message() -> None:
    assert b"a &lt; b" in s3_error(500, "InternalError", "a < b")
