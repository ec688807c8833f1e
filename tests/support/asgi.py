"""A real server on loopback for an ASGI application, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(app: Any, *, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve on a port of its own, in a thread of its own; yields the port."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    config.load()
    config.ssl = tls
    server = uvicorn.Server(config)
    with socket.create_server((HOST, 0)) as listener:
        # It accepts what comes from here on: connections wait in the listener until the loop runs.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
