"""TLS read into memory that is already there, by the OpenSSL that the package cryptography brings.

Python's own TLS sockets decrypt with the OpenSSL of the system, and Debian 12's 3.0 does not know the wide AES
instructions of current servers. The same loop with both, on two cores that are the server's too, into fresh memory and
with BLAKE3: 1.20 GB/s here, 1.03 with Python's sockets.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from typing import Any

from s3.endpoint import ca_bundle

# AES-128 before AES-256, as S3 itself chooses: it is as safe in TLS and costs 10 rounds a block, not 14. Up to TLS 1.2
# only what has forward secrecy, and neither SHA-1 nor DSS: OpenSSL's own list has more.
SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
OLDER_SUITES = (
    b"ECDHE+AES128+AESGCM:ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:"
    b"ECDHE+AES+SHA256:ECDHE+AES+SHA384:!aNULL:!aDSS"
)
LARGEST_READ = 2**30  # bytes; OpenSSL counts in 32 bits


class TlsError(OSError):
    """OpenSSL cannot go on; the message is its reason."""


class UntrustedError(TlsError):
    """The server's certificate is not accepted; the message says why."""


class TlsContext:
    """What the connections of one bucket share: the certificates of the authorities they trust. For many threads.

    Raises OSError for a bundle (a file, or a folder as `openssl rehash` makes it) that cannot be used.
    """

    def __init__(self, bundle: str) -> None:
        lib, ffi = _openssl()
        found = lib.SSL_CTX_new(lib.TLS_client_method())
        _check(found != ffi.NULL, "TLS")
        self.pointer = ffi.gc(found, lib.SSL_CTX_free)
        _check(lib.SSL_CTX_set_min_proto_version(self.pointer, lib.TLS1_2_VERSION), "TLS 1.2")
        _check(lib.SSL_CTX_set_ciphersuites(self.pointer, SUITES), "TLS 1.3's ciphers")
        _check(lib.SSL_CTX_set_cipher_list(self.pointer, OLDER_SUITES), "TLS 1.2's ciphers")
        lib.SSL_CTX_set_verify(self.pointer, lib.SSL_VERIFY_PEER, ffi.NULL)
        os.stat(bundle)  # noqa: PTH116 - OpenSSL's own words for a missing file name none
        is_folder = os.path.isdir(bundle)  # noqa: PTH112 - a string from the environment, looked at once
        name = os.fsencode(bundle)
        file, folder = (ffi.NULL, name) if is_folder else (name, ffi.NULL)
        _check(lib.SSL_CTX_load_verify_locations(self.pointer, file, folder), bundle)


def tls_context() -> TlsContext:
    """What boto3 trusts. Raises OSError for a bundle that cannot be used."""
    return TlsContext(ca_bundle())


class TlsStream:
    """A TLS client on a connected socket; the handshake is done on construction. For one thread.

    The socket blocks, as the kernel sees it, and limits waiting by SO_RCVTIMEO. `host`, a name or an address, is what
    the certificate must be for. Raises OSError: UntrustedError for a certificate that is not accepted, TimeoutError
    when the limit passes without a byte.
    """

    def __init__(self, plain: socket.socket, context: TlsContext, host: str) -> None:
        lib, ffi = _openssl()
        self._lib, self._ffi = lib, ffi
        self._plain = plain
        found = lib.SSL_new(context.pointer)
        _check(found != ffi.NULL, "a TLS session")
        self._session = ffi.gc(found, lib.SSL_free)
        self._ended = ""  # why the stream is over, where that came after bytes
        self._expect(host)
        _check(lib.SSL_set_fd(self._session, plain.fileno()), "the TLS session's socket")
        lib.SSL_set_connect_state(self._session)
        lib.ERR_clear_error()
        result = lib.SSL_do_handshake(self._session)
        if result != 1:
            failure = self._explained(result)
            refusal = lib.SSL_get_verify_result(self._session)
            if isinstance(failure, TlsError) and refusal != lib.X509_V_OK:
                raise UntrustedError(self._refused(refusal, host))
            raise failure or ConnectionResetError("the server closed it during the TLS handshake")

    def sendall(self, data: bytes) -> None:
        self._assert_open()
        self._lib.ERR_clear_error()
        result = self._lib.SSL_write(self._session, data, len(data))
        if result <= 0:
            raise self._explained(result) or ConnectionResetError("the server closed it")

    def recv_into(self, into: memoryview, *, whole: bool, seconds: float) -> int:
        """Fill `into`, or with `whole` false take what is there; 0 at the end of the stream.

        Returns early, with something, when `seconds` have passed; but never within a record.
        """
        self._assert_open()
        if self._ended:
            raise TlsError(self._ended)
        lib, ffi = self._lib, self._ffi
        size = min(len(into), LARGEST_READ)
        filled = 0
        until = time.monotonic() + seconds
        lib.ERR_clear_error()
        # Let go of explicitly: left to the garbage collector, a buffer that an error's frames hold can crash CPython.
        with ffi.from_buffer("char[]", into, require_writable=True) as buffer:
            while filled < size:
                count = lib.SSL_read(self._session, buffer + filled, size - filled)  # of one record
                if count <= 0:
                    failure = self._explained(count)
                    try:
                        if failure is not None and not filled:
                            raise failure
                        if failure is not None and not isinstance(failure, TimeoutError):
                            self._ended = str(failure)  # what has arrived counts first
                    finally:
                        del failure  # an error that its own frame holds keeps `into` until the next collection
                    break
                filled += count
                if not whole or time.monotonic() > until:
                    break
        return filled

    def _expect(self, host: str) -> None:
        lib, session = self._lib, self._session
        parameters = lib.SSL_get0_param(session)
        try:
            address = ipaddress.ip_address(host).packed
        except ValueError:
            name = _ascii(host)
            lib.X509_VERIFY_PARAM_set_hostflags(
                parameters,
                lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT,
            )
            # For an empty name OpenSSL would check none.
            known = name and lib.X509_VERIFY_PARAM_set1_host(parameters, name, len(name))
            _check(known or 0, repr(host))
            lib.SSL_set_tlsext_host_name(session, name)
        else:
            _check(lib.X509_VERIFY_PARAM_set1_ip(parameters, address, len(address)), host)

    def _assert_open(self) -> None:
        """OpenSSL knows the socket by its number, which may be another's once it is closed."""
        if self._plain.fileno() < 0:
            raise ConnectionAbortedError("the connection is closed")

    def _explained(self, result: int) -> OSError | None:
        """Why OpenSSL returned `result`; None where the server has ended the stream, in whatever way."""
        lib = self._lib
        number = self._ffi.errno  # before anything else can change it
        match lib.SSL_get_error(self._session, result):
            case lib.SSL_ERROR_ZERO_RETURN:
                return None
            case lib.SSL_ERROR_WANT_READ | lib.SSL_ERROR_WANT_WRITE:
                return TimeoutError("no answer in time")
            case lib.SSL_ERROR_SYSCALL:
                return OSError(number, os.strerror(number)) if number else None
        if lib.ERR_GET_REASON(lib.ERR_peek_error()) == lib.SSL_R_UNEXPECTED_EOF_WHILE_READING:
            lib.ERR_clear_error()
            return None
        return TlsError(_reason())

    def _refused(self, verdict: int, host: str) -> str:
        """Why the certificate is not accepted: OpenSSL's words, and for another's whom it was to be for."""
        words: str = self._ffi.string(self._lib.X509_verify_cert_error_string(verdict)).decode()
        names = (self._lib.X509_V_ERR_HOSTNAME_MISMATCH, self._lib.X509_V_ERR_IP_ADDRESS_MISMATCH)
        return f"{words}: it is not for {host!r}" if verdict in names else words


def _openssl() -> tuple[Any, Any]:
    """OpenSSL's functions and cffi's, both untyped; loading them takes a few hundredths of a second."""
    from cryptography.hazmat.bindings.openssl.binding import Binding

    binding = Binding()
    return binding.lib, binding.ffi


def _ascii(host: str) -> bytes:
    """A host's name as certificates have it: without the dot that may end it. Raises TlsError."""
    try:
        return host.removesuffix(".").encode("idna")
    except UnicodeError as error:
        raise TlsError(f"{host!r} is no host's name: {error}") from None


def _check(accepted: int, what: str) -> None:
    """Raise a TlsError that says `what`, where OpenSSL has not accepted it."""
    if accepted != 1:
        raise TlsError(f"{what}: {_reason()}")


def _reason() -> str:
    """What went wrong first in this thread, in OpenSSL's words; it has forgotten it afterwards."""
    lib, ffi = _openssl()
    words = lib.ERR_reason_error_string(lib.ERR_get_error())
    lib.ERR_clear_error()
    return "unknown" if words == ffi.NULL else ffi.string(words).decode("utf-8", "replace")
