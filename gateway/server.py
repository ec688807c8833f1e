"""What `python -m gateway` runs: Cog's server and the door before it, made, started and stopped together."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

import httpx
import uvicorn
import uvloop

from gateway import logs, tracing
from gateway.addresses import Guard, GuardedTransport
from gateway.app import Parts, build
from gateway.cog_client import CogClient, new_session
from gateway.cog_process import CogGaveUpError, CogProcess
from gateway.connections import Connection, allow_files
from gateway.desk import Desk
from gateway.ledger import Ledger
from gateway.settings import DOOR_SECRETS, GatewaySettings, load_gateway_settings
from gateway.state import ColdStartFile
from gateway.sweep import Sweep
from gateway.webhooks import Webhooks
from images.records import RecordStore
from images.store import ImageStore
from s3 import connect
from s3.async_client import AsyncClient
from settings import SettingsError

# After the grace of those who wait, for answers that are on their way and Cog's own end.
LAST_S = 5.0
KEEP_ALIVE_S = 75  # longer than the usual load balancer's, which must be the one to close
BACKLOG = 2048
# Records are small: a bucket that takes longer over one is as good as gone, and its callers are to be told.
BUCKET_ATTEMPTS = 3
BUCKET_CONNECTIONS = 32
BUCKET_READ_S = 5.0
BUCKET_PAUSE_S = 2.0
EXIT_GAVE_UP = 1
EXIT_SETTINGS = 2

_log = logging.getLogger("gateway")


def run() -> NoReturn:
    """Serve, and end this process with the exit code."""
    code = main()
    # Without waiting for threads that still ask a bucket which does not answer; nothing that is said later would be
    # recorded. What cannot be written any more (a full disk, a closed pipe) changes no exit code.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> int:
    try:
        settings = load_gateway_settings()
        logs.configure(settings.log_format)
        allow_files()
        with listening(settings.host, settings.port) as listener:
            return uvloop.run(serve(settings, os.environ, listener))
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except ListenError as error:
        _log.error("%s", error)
        return EXIT_GAVE_UP


class ListenError(Exception):
    """Nobody can be served at the address; the message says why, and what to try."""


def listening(host: str, port: int) -> socket.socket:
    """Take the port before anything is started for it. Raises ListenError."""
    is_v6 = ":" in host
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if is_v6 else socket.AF_INET,
            backlog=BACKLOG,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        # Its own words repeat the address, but for a name that has none.
        is_unknown = isinstance(error, socket.gaierror) or not error.errno
        why = (error.strerror or str(error)) if is_unknown else os.strerror(error.errno or 0)
        raise ListenError(
            f"cannot listen on port {port} of {host} ({why}): another server may have it, or the machine may not have "
            "the address. Set PORT and HOST to what is free"
        ) from error


async def serve(
    settings: GatewaySettings, environ: Mapping[str, str], listener: socket.socket
) -> int:
    """Serve until SIGTERM or SIGINT, or until Cog's server is given up; returns the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _parts(settings, environ) as (parts, cog):
        app = build(parts)
        # What is there now stays: looking through all of it again would hold everybody up for 30 ms.
        gc.collect()
        gc.freeze()
        server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_S),
            )
        )
        # The door first: whoever asks while the model loads is told so.
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        _log.info("listening on port %d of %s", listener.getsockname()[1], settings.host)
        running = asyncio.create_task(cog.run())
        sweeping = asyncio.create_task(Sweep(parts.desk).run())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, running, stopped}, return_when=asyncio.FIRST_COMPLETED)

        sweeping.cancel()
        if stopped.done():
            _log.info("stopping: what runs may finish within %g s", settings.grace_seconds)
        await parts.desk.close(settings.grace_seconds if stopped.done() else 0.0)
        server.should_exit = True
        await cog.stop(LAST_S)
        stopped.cancel()
        ended = await asyncio.gather(serving, running, return_exceptions=True)
        await asyncio.to_thread(parts.desk.tracing.close)
        return _exit_code(ended, server)


def _exit_code(ended: Sequence[BaseException | None], server: uvicorn.Server) -> int:
    for failure in ended:
        if isinstance(failure, CogGaveUpError):
            _log.error("%s", failure)
            return EXIT_GAVE_UP
        if failure is not None:
            _log.error("unexpected error", exc_info=failure)
            return EXIT_GAVE_UP
    return 0 if server.started else EXIT_GAVE_UP


@asynccontextmanager
async def _parts(
    settings: GatewaySettings, environ: Mapping[str, str]
) -> AsyncIterator[tuple[Parts, CogProcess]]:
    """Everything that has to be closed again."""
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(new_session())
        guard = Guard(settings.allowed_hosts)
        theirs = await stack.enter_async_context(
            httpx.AsyncClient(
                transport=GuardedTransport(guard), follow_redirects=False, trust_env=False
            )
        )
        folder = settings.cold_start_folder or _folder(stack)
        # As Cog's own server, which looks for the runner and its schema where it is started.
        cog = CogProcess(
            ours, environment=_cogs_environment(settings, environ, folder), cwd=Path.cwd()
        )
        records = await stack.enter_async_context(
            AsyncClient(
                settings,
                connections=BUCKET_CONNECTIONS,
                attempts=BUCKET_ATTEMPTS,
                read_timeout=BUCKET_READ_S,
                longest_pause=BUCKET_PAUSE_S,
            )
        )
        ledger = _ledger(settings, records)
        stack.callback(ledger.close)
        client = CogClient(cog, ours)
        stack.callback(client.close)
        desk = Desk(
            cog,
            client,
            ledger,
            _webhooks(settings, theirs),
            slots=settings.slots,
            queue_size=settings.queue_size,
            prediction_seconds=settings.prediction_seconds,
            tracing=tracing.configure(environ),
        )
        yield Parts(settings, desk, ColdStartFile(folder), guard), cog


def _folder(stack: AsyncExitStack) -> Path | None:
    """For the timeline of the start, which is worth less than the start."""
    try:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cold-start-")))
    except OSError as error:
        _log.warning("the start's timeline is not kept: no folder can be made for it (%s)", error)
        return None


def _ledger(settings: GatewaySettings, records: AsyncClient) -> Ledger:
    images = connect(settings, attempts=BUCKET_ATTEMPTS, read_timeout=BUCKET_READ_S)
    return Ledger(
        RecordStore(records, settings.image_bucket, settings.image_prefix),
        ImageStore(
            images,
            settings.image_bucket,
            settings.image_prefix,
            settings.image_url_lifetime,
            settings.public_base_url,
        ),
        keys_may_block=settings.access_key_id is None,
    )


def _webhooks(settings: GatewaySettings, client: httpx.AsyncClient) -> Webhooks:
    secret, token = settings.webhook_signing_secret, settings.webhook_auth_token
    return Webhooks(
        client,
        signing_secret=None if secret is None else secret.get_secret_value(),
        auth_token=None if token is None else token.get_secret_value(),
    )


def _cogs_environment(
    settings: GatewaySettings, environ: Mapping[str, str], cold_start: Path | None
) -> dict[str, str]:
    """Ours, without what is the door's alone."""
    return {
        **{name: value for name, value in environ.items() if name not in DOOR_SECRETS},
        "COG_MAX_CONCURRENCY": str(settings.slots),
        **({} if cold_start is None else {"COLD_START_DIR": str(cold_start)}),
    }


class _Server(uvicorn.Server):
    """Signals are ours: a stop begins with those who wait, not with their connections."""

    def install_signal_handlers(self) -> None:
        pass

    def capture_signals(self):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext()
