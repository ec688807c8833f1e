"""The watch on latest.json asks for next to nothing, sees every new version, and outlives whatever lies there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy, scripted
from tests.support.faults import Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.weights.folder_bucket import BUCKET, MODEL, bucket_at
from weights import BucketError, ManifestError
from weights.latest import LatestWatch
from weights.manifest import dump_latest
from weights.objects import ATTEMPTS

KEY = f"{MODEL}/latest.json"
FIRST, SECOND = "0123456789abcdef" * 2, "fedcba9876543210" * 2


class Published:
    """A model's latest.json, and the server that has it."""

    def __init__(self, root: Path, server: ObjectServer) -> None:
        self.server = server
        self.file = root / BUCKET / KEY
        self.file.parent.mkdir(parents=True)

    def write(self, data: bytes) -> None:
        """Replace it, as a bucket does: whole, and never seen half."""
        partial = self.file.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(self.file)

    def statuses(self) -> list[int]:
        return [request.status for request in self.server.requests(KEY)]


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with ObjectServer(tmp_path) as server:
        yield Published(tmp_path, server)


@pytest.fixture
def watch(published: Published) -> LatestWatch:
    return LatestWatch(bucket_at(published.server.endpoint_url), MODEL)


def test_an_unchanged_version_costs_a_head_without_a_body(published, watch):
    published.write(dump_latest(FIRST))
    assert [watch.version() for _ in range(4)] == [FIRST] * 4
    assert published.statuses() == [200, 304, 304, 304]
    assert published.server.bytes_sent() == len(dump_latest(FIRST))


def test_another_version_is_seen_at_the_next_question(published, watch):
    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST

    published.write(dump_latest(SECOND))

    assert watch.version() == SECOND
    assert watch.version() == SECOND
    assert published.statuses() == [200, 200, 304]


def test_a_bare_folder_has_no_version_until_one_is_published(published, watch):
    assert watch.version() is None
    assert watch.version() is None
    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST


def test_a_latest_that_was_taken_away_is_none(published, watch):
    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST

    published.file.unlink()
    assert watch.version() is None

    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"version": "../../etc"}', b"\xff\x00"])
def test_a_broken_latest_is_an_error_each_time_and_the_watch_goes_on(published, watch, broken):
    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST

    published.write(broken)
    for _ in range(2):
        with pytest.raises(ManifestError, match=KEY):
            watch.version()

    published.write(dump_latest(SECOND))
    assert watch.version() == SECOND
    assert watch.version() == SECOND
    assert published.statuses() == [200, 200, 200, 200, 304]


def test_the_version_from_before_a_broken_latest_is_still_known(published, watch):
    published.write(dump_latest(FIRST))
    assert watch.version() == FIRST
    published.write(b"{")
    with pytest.raises(ManifestError):
        watch.version()

    published.write(dump_latest(FIRST))

    assert watch.version() == FIRST
    assert published.statuses() == [200, 200, 304]


def test_a_server_that_fails_for_a_while_is_an_error_and_the_watch_goes_on(published):
    published.write(dump_latest(FIRST))
    failing = Fault(FaultKind.STATUS, status=503, retry_after="0")
    decide = scripted([("*", failing, ATTEMPTS, 1)])
    with FaultProxy(published.server.endpoint_url, decide) as proxy:
        watch = LatestWatch(bucket_at(proxy.endpoint_url), MODEL)
        assert watch.version() == FIRST

        with pytest.raises(BucketError, match=KEY):
            watch.version()

        published.write(dump_latest(SECOND))
        assert watch.version() == SECOND


def test_a_server_without_etags_is_asked_for_all_of_it_each_time(published):
    published.write(dump_latest(FIRST))
    decide = scripted([("*", Fault(FaultKind.NO_ETAG), None, 0)])
    with FaultProxy(published.server.endpoint_url, decide) as proxy:
        watch = LatestWatch(bucket_at(proxy.endpoint_url), MODEL)
        assert watch.version() == FIRST
        published.write(dump_latest(SECOND))
        assert watch.version() == SECOND
    assert published.statuses() == [200, 200]


def test_a_server_that_ignores_conditions_is_understood(published, tmp_path):
    published.write(dump_latest(FIRST))
    with ObjectServer(tmp_path, ignore_conditions=True) as server:
        watch = LatestWatch(bucket_at(server.endpoint_url), MODEL)
        assert [watch.version(), watch.version()] == [FIRST, FIRST]
        assert [request.status for request in server.requests(KEY)] == [200, 200]
