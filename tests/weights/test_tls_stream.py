"""The TLS client by itself: whom it takes a server for, what it offers, and what its reads leave behind."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import struct
import threading
import weakref

import pytest

from tests.support.authority import Authority
from weights.tls import TlsError, TlsStream, UntrustedError, tls_context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("trusted") / "authority")


@pytest.fixture(autouse=True)
def only_this_authority(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))


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
