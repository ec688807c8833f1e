"""Over TLS and through proxies a load is as whole as without, and a server that is not the right one gets nothing."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator

import pytest

from tests.support.authority import DAY, NAME, Authority
from tests.support.object_server import ObjectServer
from tests.support.tls_front import ConnectProxy, Cut, TlsFront
from tests.weights.folder_bucket import (
    BUCKET,
    MODEL,
    PublishedFolder,
    assert_whole,
    bucket_at,
    read_all,
    write_published,
)
from weights import BucketError, ReadOptions, open_model
from weights.transport import Patience

READERS = ["thread", "process"]
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
# Waits as long as a machine busy with other things may need, and begins again at once.
PATIENT = Patience(connect=20.0, stall=20.0, pause=0.005)
REFUSED = "the server's TLS certificate was not accepted"
LATEST = f"/{BUCKET}/{MODEL}/latest.json"


# What the tests share


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"))


@pytest.fixture(scope="module")
def server(published: PublishedFolder) -> Iterator[ObjectServer]:
    with ObjectServer(published.root) as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("trusted") / "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("unknown") / "authority")


@pytest.fixture(autouse=True)
def only_this_authority_and_no_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))


def load(front: TlsFront, published: PublishedFolder, **options) -> dict[str, float]:
    """One load that must be whole; what it took."""
    bucket = bucket_at(front.endpoint_url, patience=PATIENT)
    with open_model(bucket, MODEL, options=ReadOptions(**options)) as stream:
        assert_whole(stream, published)
        return stream.counters()


def refused(front: TlsFront, reader: str, words: str = REFUSED) -> str:
    """One load that must end in an error that says `words` and names the object; all of its text."""
    bucket = bucket_at(front.endpoint_url, patience=PATIENT)
    with (
        pytest.raises(BucketError, match=words) as caught,
        open_model(bucket, MODEL, options=ReadOptions(reader=reader, connections=1)) as stream,
    ):
        read_all(stream)
    message = str(caught.value)
    assert f"s3://{BUCKET}/{MODEL}/" in message
    assert "hunter2" not in message
    return message


# Whole loads


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_a_load_over_tls_is_whole(server, published, authority, version, reader):
    context = authority.context("localhost", version=version)
    with TlsFront(server, lambda _: context) as front:
        counters = load(front, published, reader=reader)
        assert front.versions == {version.name.replace("_", ".")}
    assert counters["retries"] == 0
    assert counters["landed_bytes"] == counters["total_bytes"]


@pytest.mark.parametrize("connections", [1, 4])
def test_connections_are_kept_from_one_request_to_the_next(
    server, published, authority, connections
):
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        load(front, published, reader="thread", connections=connections)
        assert len(front.requests) > front.connections
        assert front.connections <= connections


@pytest.mark.parametrize("reader", READERS)
def test_a_server_that_closes_kept_connections_costs_no_retry(server, published, authority, reader):
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context, single=True) as front:
        counters = load(front, published, reader=reader)
        assert front.connections == len(front.requests)
    assert counters["retries"] == 0


def test_a_certificate_for_an_address_is_accepted_at_that_address(server, published, authority):
    context = authority.context("127.0.0.1")
    with TlsFront(server, lambda _: context) as front:
        bucket = bucket_at(f"https://127.0.0.1:{front.port}", patience=PATIENT)
        with open_model(bucket, MODEL, options=ReadOptions(reader="thread")) as stream:
            assert_whole(stream, published)


def test_a_folder_of_authorities_is_a_bundle_too(
    server, published, authority, stranger, monkeypatch, tmp_path
):
    for number, bundle in enumerate([stranger.bundle, authority.bundle]):
        # As `openssl rehash` names them; the two have the same subject.
        (tmp_path / f"{subject_hash(NAME)}.{number}").write_bytes(bundle.read_bytes())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path))
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        load(front, published, reader="thread")


def subject_hash(name: str) -> str:
    """OpenSSL's name for a certificate: of the SHA-1 of its subject, here a common name, in lower case as UTF-8."""
    value = name.lower().encode()
    attribute = b"\x06\x03\x55\x04\x03" + bytes([0x0C, len(value)]) + value
    sequence = bytes([0x30, len(attribute)]) + attribute
    digest = hashlib.sha1(bytes([0x31, len(sequence)]) + sequence, usedforsecurity=False).digest()
    return f"{int.from_bytes(digest[:4], 'little'):08x}"


def test_requests_ca_bundle_is_heard_as_boto3_hears_it(
    server, published, authority, stranger, monkeypatch
):
    context = authority.context("localhost")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.bundle))
    with TlsFront(server, lambda _: context) as front:
        load(front, published, reader="thread")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(stranger.bundle))
        refused(front, "thread")


# Refusals


@pytest.mark.parametrize("reader", READERS)
def test_an_unknown_authority_is_refused_at_once(server, stranger, reader):
    context = stranger.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        refused(front, reader)
        assert front.connections == 1
        assert front.requests == []


@pytest.mark.parametrize("reader", READERS)
def test_another_hosts_certificate_is_refused_at_once(server, authority, reader):
    context = authority.context("example.com", "127.0.0.1")
    with TlsFront(server, lambda _: context) as front:
        assert "'localhost'" in refused(front, reader)  # why, in OpenSSL's words
        assert front.connections == 1
        assert front.requests == []


def test_an_expired_certificate_is_refused_at_once(server, authority):
    context = authority.context("localhost", valid_for=-DAY)
    with TlsFront(server, lambda _: context) as front:
        refused(front, "thread")
        assert front.connections == 1


def test_without_a_bundle_a_certificate_of_ones_own_is_unknown(server, authority, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE")
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        refused(front, "thread")


@pytest.mark.parametrize("reader", READERS)
def test_a_certificate_that_becomes_wrong_in_the_middle_of_a_load_ends_it_at_once(
    server, authority, stranger, reader
):
    good, bad = authority.context("localhost"), stranger.context("localhost")
    small_objects = 2  # latest.json and the manifest; what follows goes to somebody else
    with TlsFront(
        server, lambda number: good if number <= small_objects else bad, single=True
    ) as front:
        refused(front, reader)
        assert front.connections == small_objects + 1


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "content", [None, b"", b"no certificate"], ids=["missing", "empty", "text"]
)
def test_a_bundle_that_cannot_be_used_is_named(
    server, authority, monkeypatch, tmp_path, content, reader
):
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_bytes(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        refused(front, reader, words="AWS_CA_BUNDLE")
        assert front.connections == 0


# Connections that end too early


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("with_close_notify", [False, True], ids=["cut", "closed"])
def test_a_connection_that_ends_in_a_body_is_gone_on_with_from_the_byte_reached(
    server, published, authority, version, with_close_notify, reader
):
    context = authority.context("localhost", version=version)
    suffix, at = "unet/diffusion_pytorch_model.safetensors", 6_000_001
    cut = Cut(suffix, at, with_close_notify)
    with TlsFront(server, lambda _: context, cut=cut) as front:
        counters = load(front, published, reader=reader, connections=1)
        (first, first_end), (second, second_end), *_ = front.ranges(suffix)
    assert counters["retries"] == 1
    assert first == 0
    assert second == at  # every byte that came was used
    assert second_end == first_end


@pytest.mark.parametrize("with_close_notify", [False, True], ids=["cut", "closed"])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_small_object_that_ends_early_is_read_again(
    server, published, authority, with_close_notify, at
):
    context = authority.context("localhost")
    with TlsFront(
        server, lambda _: context, cut=Cut("/latest.json", at, with_close_notify)
    ) as front:
        load(front, published, reader="thread")
        assert [path for path, _ in front.requests].count(LATEST) == 2


# Proxies


@pytest.mark.parametrize("reader", READERS)
def test_a_proxy_is_used_and_sees_nothing_but_the_servers_name(
    server, published, authority, monkeypatch, reader
):
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front, ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.endpoint_url)
        load(front, published, reader=reader)
        assert set(proxy.targets) == {f"localhost:{front.port}"}
        assert len(proxy.targets) == front.connections
        assert proxy.refused == 0


def test_a_proxy_gets_its_password_and_one_without_is_refused_in_words(
    server, published, authority, monkeypatch
):
    context = authority.context("localhost")
    with (
        TlsFront(server, lambda _: context) as front,
        ConnectProxy(user="reader", password="hunter2") as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://reader:hunter2@127.0.0.1:{proxy.port}")
        load(front, published, reader="thread")
        assert proxy.targets
        assert proxy.refused == 0

        monkeypatch.setenv("HTTPS_PROXY", f"http://reader:wrong@127.0.0.1:{proxy.port}")
        refused(front, "thread", words="could not be reached")
        assert proxy.refused


def test_no_proxy_excepts_the_server(server, published, authority, monkeypatch):
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # nobody there
        monkeypatch.setenv("NO_PROXY", "localhost")
        load(front, published, reader="thread")


@pytest.mark.parametrize("reader", READERS)
def test_a_wrong_certificate_behind_a_proxy_is_refused_at_once(
    server, stranger, monkeypatch, reader
):
    context = stranger.context("localhost")
    with TlsFront(server, lambda _: context) as front, ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.endpoint_url)
        refused(front, reader)
        assert len(proxy.targets) == 1


# Where it is read


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("busy", [True, False])
def test_left_to_itself_a_load_runs_in_a_process_beside_where_tls_meets_other_work(
    server, published, authority, secure, busy
):
    context = authority.context("localhost")
    with TlsFront(server, lambda _: context) as front:
        bucket = bucket_at(front.endpoint_url if secure else server.endpoint_url, patience=PATIENT)
        with open_model(bucket, MODEL, options=ReadOptions(busy=busy)) as stream:
            assert (stream.ring_memory is not None) == (secure and busy)
            assert_whole(stream, published)
