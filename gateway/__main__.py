"""`python -m gateway`: Cog's server and the door before it, as one process to start and to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
import uvloop

from gateway import logs, tracing
from gateway.addresses import Guard, GuardedTransport
from gateway.app import Parts, build
from gateway.cog_client import CogClient
from gateway.cog_process import CogGaveUpError, CogProcess
from gateway.desk import Desk
from gateway.ledger import THREADS, Ledger
from gateway.settings import DOOR_SECRETS, GatewaySettings, load_gateway_settings
from gateway.state import ColdStartFile
from gateway.sweep import Sweep
from gateway.webhooks import Webhooks
from images.records import RecordStore
from images.store import ImageStore
from s3 import connect
from settings import SettingsError

# After the grace of those who wait, for answers that are on their way and Cog's own end.
LAST_S = 5.0
KEEP_ALIVE_S = 75  # longer than the usual load balancer's, which must be the one to close
MOST_CONNECTIONS = 2000
EXIT_GAVE_UP = 1
EXIT_SETTINGS = 2

_log = logging.getLogger("gateway")


def main() -> int:
    try:
        settings = load_gateway_settings()
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    logs.configure(settings.log_format)
    return uvloop.run(serve(settings, os.environ))


async def serve(settings: GatewaySettings, environ: Mapping[str, str]) -> int:
    """Serve until SIGTERM or SIGINT, or until Cog's server is given up; returns the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _parts(settings, environ) as (parts, cog):
        server = _Server(
            uvicorn.Config(
                build(parts),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_S),
                limit_concurrency=MOST_CONNECTIONS,
            )
        )
        # The door first: whoever asks while the model loads is told so.
        serving = asyncio.create_task(server.serve())
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
        if isinstance(failure, SystemExit):  # uvicorn's way to say that it could not listen
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
        health = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        ours = await stack.enter_async_context(
            httpx.AsyncClient(
                trust_env=False,
                limits=httpx.Limits(
                    max_connections=2 * settings.slots + 16,
                    max_keepalive_connections=settings.slots,
                ),
            )
        )
        guard = Guard(settings.allowed_hosts)
        theirs = await stack.enter_async_context(
            httpx.AsyncClient(
                transport=GuardedTransport(guard), follow_redirects=False, trust_env=False
            )
        )
        folder = settings.cold_start_folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="cold-start-"))
        )
        # As Cog's own server, which looks for the runner and its schema where it is started.
        cog = CogProcess(
            health, environment=_cogs_environment(settings, environ, folder), cwd=Path.cwd()
        )
        ledger = _ledger(settings)
        stack.callback(ledger.close)
        desk = Desk(
            cog,
            CogClient(cog, ours),
            ledger,
            _webhooks(settings, theirs),
            slots=settings.slots,
            queue_size=settings.queue_size,
            prediction_seconds=settings.prediction_seconds,
            tracing=tracing.configure(environ),
        )
        yield Parts(settings, desk, ColdStartFile(folder), guard), cog


def _ledger(settings: GatewaySettings) -> Ledger:
    client = connect(settings, connections=THREADS)
    return Ledger(
        RecordStore(client, settings.image_bucket, settings.image_prefix),
        ImageStore(
            client,
            settings.image_bucket,
            settings.image_prefix,
            settings.image_url_lifetime,
            settings.public_base_url,
        ),
    )


def _webhooks(settings: GatewaySettings, client: httpx.AsyncClient) -> Webhooks:
    secret, token = settings.webhook_signing_secret, settings.webhook_auth_token
    return Webhooks(
        client,
        signing_secret=None if secret is None else secret.get_secret_value(),
        auth_token=None if token is None else token.get_secret_value(),
    )


def _cogs_environment(
    settings: GatewaySettings, environ: Mapping[str, str], cold_start: Path
) -> dict[str, str]:
    """Ours, without what is the door's alone."""
    return {
        **{name: value for name, value in environ.items() if name not in DOOR_SECRETS},
        "COG_MAX_CONCURRENCY": str(settings.slots),
        "COLD_START_DIR": str(cold_start),
    }


class _Server(uvicorn.Server):
    """Signals are ours: a stop begins with those who wait, not with their connections."""

    def install_signal_handlers(self) -> None:
        pass

    def capture_signals(self):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext()


if __name__ == "__main__":
    sys.exit(main())
