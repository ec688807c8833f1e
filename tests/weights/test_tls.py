"""Over TLS and through proxies a load is as whole as without, and a server that is not the right one gets nothing."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import gc
import hashlib
import ipaddress
import select
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.object_server import LoopbackServer, ObjectServer, Wire
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
from weights.tls import TlsError, TlsStream, UntrustedError, tls_context
from weights.transport import Patience

READERS = ["thread", "process"]
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
# Waits as long as a machine busy with other things may need, and begins again at once.
PATIENT = Patience(connect=20.0, stall=20.0, pause=0.005)
REFUSED = "the server's TLS certificate was not accepted"
LATEST = f"/{BUCKET}/{MODEL}/latest.json"
AUTHORITY = "A throw-away authority"
DAY = dt.timedelta(days=1)


# Certificates


class Authority:
    """A throw-away certificate authority; `bundle` is the file that makes a client trust it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(AUTHORITY)
        self._certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.bundle = folder / "authority.pem"
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def context(
        self,
        *names: str,
        valid_for: dt.timedelta = DAY,
        version: ssl.TLSVersion | None = None,
        alternatives: Sequence[str] | None = None,
    ) -> ssl.SSLContext:
        """A server's side of TLS, with a certificate for these host names and addresses.

        The first is its common name; `alternatives` are the names it is for, where they are not the same.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(_name(names[0]), self._name, key, valid_for)
            .add_extension(
                x509.SubjectAlternativeName([_alternative(name) for name in alternatives or names]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(issuer_id, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._folder / f"{certificate.serial_number}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    valid_for: dt.timedelta = DAY,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + valid_for)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# Servers


@dataclass(frozen=True)
class Cut:
    """The answer to the first request for a key that ends in `suffix` ends after `at` bytes of its body."""

    suffix: str
    at: int
    with_close_notify: bool


class TlsFront(LoopbackServer):
    """Speaks TLS before an ObjectServer, and keeps each connection for as long as the client wants it.

    `context_of` gives the certificate of each connection, by its number from 1. `single` closes each connection after
    one answer, without having said so.
    """

    def __init__(
        self,
        upstream: ObjectServer,
        context_of: Callable[[int], ssl.SSLContext],
        *,
        cut: Cut | None = None,
        single: bool = False,
    ) -> None:
        self._upstream = ("127.0.0.1", upstream.port)
        self._context_of = context_of
        self._cut = cut
        self._single = single
        self.connections = 0
        self.versions: set[str | None] = set()
        self.requests: list[tuple[str, str | None]] = []  # path and range
        super().__init__("tls-front")

    @property
    def endpoint_url(self) -> str:
        return f"https://localhost:{self.port}"

    def ranges(self, suffix: str) -> list[tuple[int, int]]:
        """First and last byte of each request for a key that ends in `suffix`."""
        asked = [
            wanted.removeprefix("bytes=").split("-")
            for path, wanted in self.requests
            if path.endswith(suffix) and wanted
        ]
        return [(int(first), int(last)) for first, last in asked]

    def serve(self, client: socket.socket) -> None:
        with self._lock:
            self.connections += 1
            context = self._context_of(self.connections)
        secure = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        self.adopt(secure)
        upstream = socket.create_connection(self._upstream)
        self.adopt(upstream)
        try:
            secure.do_handshake()
            self.versions.add(secure.version())
            wire, behind = Wire(secure), Wire(upstream)
            while self._answer(wire, behind) and not self._single:
                pass
        finally:
            self.release(upstream)
            self.release(secure)  # without a close_notify, as many a server does

    def _answer(self, wire: Wire, behind: Wire) -> bool:
        request = wire.head()
        if request is None:
            return False
        path = request.start.split(" ")[1]
        behind.sock.sendall(request.encode())
        answer = behind.head()
        assert answer is not None
        with self._lock:
            self.requests.append((path, request.get("range")))
            cut = self._cut if self._cut and path.endswith(self._cut.suffix) else None
            if cut:
                self._cut = None
        wire.sock.sendall(answer.encode())
        left = cut.at if cut else None
        for piece in behind.sized(0 if answer.status == 304 else answer.length or 0):
            wire.sock.sendall(piece[:left])
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    break
        if cut and cut.with_close_notify:
            assert isinstance(wire.sock, ssl.SSLSocket)
            wire.sock.settimeout(5)
            wire.sock.unwrap()
        return not cut


class ConnectProxy(LoopbackServer):
    """An HTTP proxy that knows CONNECT and nothing else; with `password`, only for who sends it."""

    def __init__(self, *, user: str = "", password: str = "") -> None:
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._wanted = f"Basic {pair}" if password else None
        self.targets: list[str] = []
        self.refused = 0
        super().__init__("connect-proxy")

    def serve(self, client: socket.socket) -> None:
        head = Wire(client).head()
        assert head is not None
        method, target, _ = head.start.split(" ")
        if method != "CONNECT" or head.get("proxy-authorization") != self._wanted:
            self.refused += 1
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        self.targets.append(target)
        host, _, port = target.rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        self.adopt(upstream)
        try:
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n")
            others = {client: upstream, upstream: client}
            while True:
                for ready in select.select(list(others), [], [])[0]:
                    piece = ready.recv(256 * 1024)
                    if not piece:
                        return
                    others[ready].sendall(piece)
        finally:
            self.release(upstream)


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


def test_a_certificate_for_all_names_of_a_domain_is_accepted_for_one_of_them_and_no_deeper(
    authority,
):
    context = authority.context("*.buckets.example")
    assert handshake(context, "mine.buckets.example") == ""
    for host in ("buckets.example", "a.mine.buckets.example", "mine.buckets.example.org"):
        assert "is not for" in handshake(context, host)


def test_a_name_that_is_only_the_subjects_common_name_is_refused(authority):
    context = authority.context("bucket.example", alternatives=["127.0.0.1"])
    assert "is not for" in handshake(context, "bucket.example")


def test_a_certificate_for_a_part_of_a_name_is_refused(authority):
    context = authority.context("b*.example.org")
    assert "is not for" in handshake(context, "bucket.example.org")


def test_a_name_may_end_with_a_dot(authority):
    assert handshake(authority.context("bucket.example"), "bucket.example.") == ""


@pytest.mark.parametrize("host", ["a..b", 64 * "a" + ".example"])
def test_what_is_no_name_is_named(authority, host):
    with pytest.raises(TlsError, match="is no host's name"):
        handshake(authority.context("localhost"), host)


@pytest.mark.parametrize("suite", ["AES128-SHA", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA"])
def test_suites_without_forward_secrecy_or_with_sha1_are_not_offered(suite):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(60)
        greeting = threading.Thread(target=_try_to_greet, args=(ours,))
        greeting.start()
        hello = theirs.recv(64 * 1024)
        theirs.close()
        greeting.join()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(f"{suite}:@SECLEVEL=0")
    (number,) = (c["id"] & 0xFFFF for c in context.get_ciphers() if c["name"] == suite)
    assert number not in offered_suites(hello)
    assert 0xC02B in offered_suites(hello)  # ECDHE-ECDSA-AES128-GCM-SHA256


def _try_to_greet(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        TlsStream(connection, tls_context(), "localhost")


def offered_suites(hello: bytes) -> list[int]:
    """The cipher suites of a ClientHello, in its order (RFC 8446, 4.1.2)."""
    at = 5 + 4 + 2 + 32  # the record's head, the handshake's, version and random
    at += 1 + hello[at]  # the session's id
    length = int.from_bytes(hello[at : at + 2])
    found = hello[at + 2 : at + 2 + length]
    return [int.from_bytes(found[i : i + 2]) for i in range(0, length, 2)]


def test_a_read_that_timed_out_holds_on_to_no_memory(authority):
    ours, theirs = socket.socketpair()
    accepted = threading.Event()
    accepting = threading.Thread(target=_accept_and_wait, args=(authority, theirs, accepted))
    accepting.start()
    stream = TlsStream(ours, tls_context(), "localhost")
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 1000))
    into = memoryview(bytearray(100))
    gc.disable()
    try:
        with pytest.raises(TimeoutError) as caught:
            stream.recv_into(into, whole=True, seconds=60)
        del caught
        held = weakref.ref(into)
        del into
        assert held() is None
    finally:
        gc.enable()
        accepted.set()
        accepting.join()
        ours.close()


def _accept_and_wait(
    authority: Authority, connection: socket.socket, ended: threading.Event
) -> None:
    with authority.context("localhost").wrap_socket(connection, server_side=True):
        ended.wait(60)


def test_no_server_can_be_nobody():
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TlsError, match="''"):
        TlsStream(ours, tls_context(), "")


def handshake(context: ssl.SSLContext, host: str) -> str:
    """One handshake with a server of that certificate, which is to be `host`; why it was refused, or nothing."""
    ours, theirs = socket.socketpair()
    accepting = threading.Thread(target=_accept, args=(context, theirs))
    accepting.start()
    try:
        TlsStream(ours, tls_context(), host)
    except UntrustedError as refusal:
        return str(refusal)
    else:
        return ""
    finally:
        ours.close()
        accepting.join()


def _accept(context: ssl.SSLContext, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        context.wrap_socket(connection, server_side=True).close()


def test_what_came_before_an_error_counts_and_the_error_comes_with_the_next_read(authority):
    ours, theirs = socket.socketpair()

    def send_a_record_and_then_noise() -> None:
        secure = authority.context("localhost").wrap_socket(theirs, server_side=True)
        secure.sendall(b"whole")
        plain = socket.socket(fileno=secure.detach())
        plain.sendall(b"\x17\x03\x03\x00\x20" + b"no record of ours".ljust(32))
        plain.close()

    sending = threading.Thread(target=send_a_record_and_then_noise)
    sending.start()
    stream = TlsStream(ours, tls_context(), "localhost")
    into = memoryview(bytearray(100))
    assert stream.recv_into(into, whole=True, seconds=60) == 5
    assert bytes(into[:5]) == b"whole"
    for _ in range(2):
        with pytest.raises(TlsError, match="bad record mac"):
            stream.recv_into(into, whole=True, seconds=60)
    sending.join()
    ours.close()
    with pytest.raises(ConnectionAbortedError):  # its number may be another socket's by now
        stream.recv_into(into, whole=True, seconds=60)


def test_a_folder_of_authorities_is_a_bundle_too(
    server, published, authority, stranger, monkeypatch, tmp_path
):
    for number, bundle in enumerate([stranger.bundle, authority.bundle]):
        # As `openssl rehash` names them; the two have the same subject.
        (tmp_path / f"{subject_hash(AUTHORITY)}.{number}").write_bytes(bundle.read_bytes())
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
