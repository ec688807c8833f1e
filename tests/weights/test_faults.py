"""Whatever a network, a cache or a server does, a load ends in verified bytes or in an error that names the object."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy, scripted, seeded
from tests.support.faults import BEFORE_HEAD, Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.weights.folder_bucket import (
    BUCKET,
    MODEL,
    PublishedFolder,
    assert_whole,
    bucket_at,
    read_all,
    write_published,
)
from weights import (
    BucketError,
    CorruptObjectError,
    ObjectChangedError,
    ReadOptions,
    WeightsError,
    open_model,
)
from weights.chunks import CHUNK_SIZE
from weights.transport import Patience

UNET = "*/unet/*.safetensors"
ANY = "*"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"))


@pytest.fixture(scope="module")
def server(published: PublishedFolder) -> Iterator[ObjectServer]:
    with ObjectServer(published.root) as server:
        yield server


def load(endpoint_url: str, published: PublishedFolder, **options) -> dict[str, float]:
    """One load that must be whole; what it took."""
    with open_model(
        bucket_at(endpoint_url), MODEL, options=ReadOptions(reader="thread", **options)
    ) as stream:
        assert_whole(stream, published)
        return stream.counters()


def struck(
    server: ObjectServer, fault: Fault, *, times: int | None = 1, skip: int = 0
) -> FaultProxy:
    return FaultProxy(server.endpoint_url, scripted([(UNET, fault, times, skip)]))


@pytest.mark.parametrize("reader", ["thread", "process"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.RESET, at=0),
        Fault(FaultKind.RESET, at=BEFORE_HEAD),
        Fault(FaultKind.RESET, at=5_000_001),
        Fault(FaultKind.TRUNCATE, at=1),
        Fault(FaultKind.TRUNCATE, at=CHUNK_SIZE - 1),
        Fault(FaultKind.STATUS, status=500),
        Fault(FaultKind.STATUS, status=503, retry_after="0"),
        Fault(FaultKind.STATUS, status=429, retry_after="0"),
        Fault(FaultKind.SLOW_DOWN),
        Fault(FaultKind.STALL, at=3_000_000),
        Fault(FaultKind.STALL, at=BEFORE_HEAD),
        Fault(FaultKind.DRIP, at=1_000_000, seconds=0.05),
        Fault(FaultKind.FLIP, at=70),
        Fault(FaultKind.FLIP, at=9_000_000),
        Fault(FaultKind.STALE),
        Fault(FaultKind.SKEWED),
        Fault(FaultKind.GARBAGE),
        Fault(FaultKind.HALF_HEADERS),
        Fault(FaultKind.REFUSE),
        Fault(FaultKind.WHOLE_BODY),
        Fault(FaultKind.RANGE_AS_200),
        Fault(FaultKind.WRONG_LENGTH, by=1),
        Fault(FaultKind.WRONG_LENGTH, by=-1),
        Fault(FaultKind.WRONG_RANGE),
        Fault(FaultKind.NO_ETAG),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.at}-{fault.status or ''}",
)
def test_a_fault_that_passes_costs_time_and_no_byte(server, published, fault, reader):
    with struck(server, fault) as proxy:
        with open_model(
            bucket_at(proxy.endpoint_url), MODEL, options=ReadOptions(reader=reader)
        ) as stream:
            assert_whole(stream, published)
        assert any(record.fault for record in proxy.requests)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault(FaultKind.FLIP, at=200), CorruptObjectError, "BLAKE3 differs"),
        (Fault(FaultKind.STATUS, status=500), BucketError, "keeps failing"),
        (Fault(FaultKind.SLOW_DOWN, retry_after="0"), BucketError, "fewer requests at once"),
        (Fault(FaultKind.EXPIRED), BucketError, "temporary credentials have expired"),
        (Fault(FaultKind.SKEWED), BucketError, "clock is too far"),
        (Fault(FaultKind.RESET), BucketError, "connection failed"),
        (Fault(FaultKind.STALL), BucketError, "bytes in 0"),
        (Fault(FaultKind.DRIP, seconds=0.1), BucketError, "bytes in"),
        (Fault(FaultKind.GARBAGE), BucketError, "does not speak HTTP"),
        (Fault(FaultKind.NO_ETAG), BucketError, "no ETag"),
        (Fault(FaultKind.WRONG_RANGE), BucketError, "asked for bytes"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("reader", ["thread", "process"])
def test_a_fault_that_stays_ends_in_an_error_that_names_the_object(
    server, fault, error, words, reader
):
    with (
        struck(server, fault, times=None) as proxy,
        pytest.raises(error, match=words) as caught,
        open_model(
            bucket_at(proxy.endpoint_url), MODEL, options=ReadOptions(reader=reader)
        ) as stream,
    ):
        read_all(stream)
    assert f"s3://{BUCKET}/{MODEL}/" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_retry_goes_on_from_the_byte_that_was_reached(server, published):
    reached = 6_000_000
    with struck(server, Fault(FaultKind.RESET, at=reached)) as proxy:
        load(proxy.endpoint_url, published, connections=1)
        ranges = [
            record.range
            for record in proxy.requests
            if record.range and "unet" in record.path and "safe" in record.path
        ]
    first, second = (int(found.removeprefix("bytes=").split("-")[0]) for found in ranges[:2])
    assert first == 0
    assert 0 < second <= reached


def test_retry_after_is_waited_for(server, published):
    busy = Fault(FaultKind.STATUS, status=503, retry_after="1")
    with struck(server, busy) as proxy:
        began = time.monotonic()
        counters = load(proxy.endpoint_url, published)
    assert time.monotonic() - began >= 1.0
    assert counters["retries"] == 1


def test_a_clock_that_is_off_is_corrected_once_and_said(server, published, caplog):
    with FaultProxy(server.endpoint_url, scripted([(ANY, Fault(FaultKind.SKEWED), 1, 0)])) as proxy:
        load(proxy.endpoint_url, published)
    assert re.search(r"clock is 3[56]\d\d s off", caplog.text)


def test_another_etag_on_every_answer_is_an_object_that_changed(server, published):
    stale = Fault(FaultKind.STALE)
    # The first chunk is the published one; all that follows is another version's, as an overwritten object's would be.
    with (
        struck(server, stale, times=None, skip=1) as proxy,
        pytest.raises((ObjectChangedError, CorruptObjectError), match="unet"),
        open_model(
            bucket_at(proxy.endpoint_url), MODEL, options=ReadOptions(reader="thread")
        ) as stream,
    ):
        read_all(stream)


def test_a_server_that_ignores_ranges_is_read_all_the_same(published):
    with ObjectServer(published.root, ignore_range=True) as server:
        load(server.endpoint_url, published)


def test_a_server_that_answers_ranges_with_200_is_read(published):
    with ObjectServer(published.root, range_as_200=True) as server:
        load(server.endpoint_url, published)


def test_a_cache_that_ignores_conditions_is_read(published):
    with ObjectServer(published.root, ignore_conditions=True) as server:
        load(server.endpoint_url, published)


def test_a_bucket_in_the_host_name_is_read(published, monkeypatch):
    with ObjectServer(published.root, require_bucket_host=True) as server:
        port = server.endpoint_url.rsplit(":", 1)[1]
        # Where a provider has a wildcard name, loopback has none.
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest: resolve(host.removeprefix(f"{BUCKET}."), *rest),
        )
        bucket = bucket_at(f"http://localhost:{port}", style="virtual")
        with open_model(bucket, MODEL, options=ReadOptions(reader="thread")) as stream:
            assert_whole(stream, published)


@pytest.mark.parametrize("url", ["http://no-such-host.invalid:1", "http://127.0.0.1:1"])
def test_a_server_that_is_gone_is_an_error_that_says_what_to_check(url):
    with pytest.raises(BucketError, match="could not be reached") as caught:
        open_model(bucket_at(url), MODEL)
    assert "AWS_ENDPOINT_URL_S3" in str(caught.value)


def test_the_last_slow_chunk_is_asked_for_a_second_time(tmp_path):
    large = write_published(tmp_path, chunks=6)
    # The last chunks' connection goes on, but at a crawl that is too fast for a stall.
    slow = Fault(FaultKind.DRIP, at=100_000, seconds=0.00002)
    with (
        ObjectServer(large.root) as server,
        FaultProxy(server.endpoint_url, scripted([(UNET, slow, 1, 2)])) as proxy,
    ):
        bucket = bucket_at(proxy.endpoint_url, patience=Patience(stall=60.0))
        options = ReadOptions(reader="thread", connections=3)
        with open_model(bucket, MODEL, options=options) as stream:
            assert_whole(stream, large)
            counters = stream.counters()
    assert counters["hedges_won"] == 1


EVERY_KIND = [kind for kind in FaultKind if kind != FaultKind.EXPIRED]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_random_mix_of_faults_ends_in_verified_bytes_or_a_clear_error(server, published):
    """A few thousand faults over hundreds of loads, the same ones in every run."""
    outcomes: Counter[str] = Counter()
    faults = 0
    for seed in range(480):
        decide = seeded(
            seed,
            0.2 + 0.7 * (seed % 6) / 5,
            EVERY_KIND,
            seconds=0.4,
            at_most=4 if seed % 8 else None,
        )
        began = time.monotonic()
        with FaultProxy(server.endpoint_url, decide) as proxy:
            try:
                with open_model(
                    bucket_at(proxy.endpoint_url),
                    MODEL,
                    options=ReadOptions(reader="process" if seed % 12 == 11 else "thread"),
                ) as stream:
                    assert_whole(stream, published)
                outcomes["whole"] += 1
            except WeightsError as error:
                named = MODEL in str(error)
                assert named, error  # noqa: PT017 - only one outcome of two
                outcomes[type(error).__name__] += 1
            faults += sum(record.fault is not None for record in proxy.requests)
        assert time.monotonic() - began < 60, f"seed {seed} hangs"
    print(f"{faults} faults over {sum(outcomes.values())} loads: {dict(outcomes)}")
    assert faults >= 2000
    assert outcomes["whole"] >= 100
    assert sum(outcomes.values()) - outcomes["whole"] >= 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights-")]
