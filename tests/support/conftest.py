"""An object server with a model, and proxies before it, for the tests of both."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import Decision, FaultProxy
from tests.support.faults import Fault
from tests.support.object_server import ObjectServer
from tests.support.plain_client import write_bucket

Proxied = Callable[..., FaultProxy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bucket(tmp_path_factory.mktemp("buckets"))


@pytest.fixture
def server(folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(folder) as server:
        yield server


@pytest.fixture
def proxied(server: ObjectServer) -> Iterator[Proxied]:
    """Makes a proxy before the server that strikes every request with one fault, or as a decision wants."""
    with contextlib.ExitStack() as proxies:

        def make(what: Fault | Decision | None = None) -> FaultProxy:
            decide = what if callable(what) else lambda _: what
            return proxies.enter_context(FaultProxy(server.endpoint_url, decide))

        yield make


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """No thread and no socket of the servers that a test starts. `usefixtures` puts it before its other fixtures."""

    def open_sockets() -> int:
        descriptors = Path("/proc/self/fd")
        found = 0
        for descriptor in descriptors.iterdir() if descriptors.exists() else ():
            with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
                found += str(descriptor.readlink()).startswith("socket:")
        return found

    before = open_sockets()
    yield
    left = [thread.name for thread in threading.enumerate()]
    assert [name for name in left if name.startswith(("fault-proxy", "object-server"))] == []
    assert open_sockets() <= before
