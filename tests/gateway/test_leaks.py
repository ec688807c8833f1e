"""A gateway that has had a thousand predictions, whatever became of them, keeps nothing of them but their records."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from gateway.app import build
from gateway.cog_folders import COGS_FOLDERS
from gateway.connections import Connection
from gateway.desk import Desk
from gateway.prediction import Prediction
from gateway.run import Run
from gateway.server import _parts, _Server
from gateway.settings import load_gateway_settings
from tests.gateway.watching import TIMEOUT_S, run
from tests.support.asgi import HOST
from tests.support.cog_server import NO_AMBIENT_CREDENTIALS, REPOSITORY
from tests.support.gateway_server import free_port

WORD = secrets.token_hex(4)  # Cog's folders are all programs' of this machine
EACH = 143  # of seven ways to come and go
AT_ONCE = 32
EVENTS = {"Accept": "text/event-stream"}
FOR_EVER = {"prompt": "x", "seconds": 60}
QUICK = {"prompt": "x"}
NOTHING = {"predictions": 0, "runs": 0, "folders": 0}


@asynccontextmanager
async def gateway_here(
    environment: dict[str, str],
) -> AsyncIterator[tuple[Desk, httpx.AsyncClient]]:
    """The whole gateway on this event loop, to be looked into, and a client of it."""
    settings = load_gateway_settings(environment)
    port = free_port()
    async with _parts(settings, environment) as (parts, cog):
        server = _Server(
            uvicorn.Config(
                build(parts),
                HOST,
                port,
                http=Connection,
                ws="none",
                log_config=None,
                lifespan="off",
            )
        )
        serving = asyncio.create_task(server.serve())
        running = asyncio.create_task(cog.run())
        async with httpx.AsyncClient(
            base_url=f"http://{HOST}:{port}", timeout=TIMEOUT_S, trust_env=False
        ) as client:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    while not (cog.status.serving and server.started):
                        await cog.wait_for_change(cog.status)
                yield parts.desk, client
            finally:
                await parts.desk.close(0.0)
                server.should_exit = True
                await cog.stop(0)
                await asyncio.gather(serving, running)


async def made(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.put(f"/predictions/{name}", json={"input": QUICK})
    assert answer.json()["status"] == "succeeded"


async def made_and_asked_for_again(client: httpx.AsyncClient, name: str) -> None:
    await made(client, name)
    await made(client, name)


async def streamed(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.put(f"/predictions/{name}", json={"input": QUICK}, headers=EVENTS)
    assert "event: completed" in answer.text


async def refused(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.put(f"/predictions/{name}", json={"input": {"prompt": 7}})
    assert answer.status_code == 422


async def cancelled(client: httpx.AsyncClient, name: str) -> None:
    asked = {"input": FOR_EVER}
    await client.put(f"/predictions/{name}", json=asked, headers={"Prefer": "respond-async"})
    assert (await client.post(f"/predictions/{name}/cancel")).is_success


async def left(client: httpx.AsyncClient, name: str, headers: dict[str, str]) -> None:
    """At any moment: before it is claimed, in line, while it is made."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(random.uniform(0, 0.3)):
            await client.put(f"/predictions/{name}", json={"input": FOR_EVER}, headers=headers)


async def plainly_left(client: httpx.AsyncClient, name: str) -> None:
    await left(client, name, {})


async def left_while_streaming(client: httpx.AsyncClient, name: str) -> None:
    await left(client, name, EVENTS)


WAYS = (
    made,
    made_and_asked_for_again,
    streamed,
    refused,
    cancelled,
    plainly_left,
    left_while_streaming,
)


async def all_ways(desk: Desk, client: httpx.AsyncClient, times: int, word: str) -> None:
    going = [
        (way, f"{WORD}-{word}-{way.__name__}-{number}") for way in WAYS for number in range(times)
    ]
    random.shuffle(going)
    few = asyncio.Semaphore(AT_ONCE)

    async def go(way: object, name: str) -> None:
        async with few:
            await way(client, name)  # type: ignore[operator]

    async with asyncio.TaskGroup() as group:
        for way, name in going:
            group.create_task(go(way, name))
    async with asyncio.timeout(TIMEOUT_S):
        while desk._live:
            await asyncio.wait({run.task for run in desk._live.values()})


def kept() -> dict[str, int]:
    """What there is of each; predictions keep all else alive: events, logs, outputs."""
    gc.collect()
    things = gc.get_objects()
    return {
        "predictions": sum(type(thing) is Prediction for thing in things),
        "runs": sum(type(thing) is Run for thing in things),
        "tasks": len(asyncio.all_tasks()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "folders": len(list(COGS_FOLDERS.glob(f"{WORD}*"))),
    }


def test_a_thousand_predictions_leave_nothing_behind(
    gateway_environment: dict[str, str],
    runner_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(runner_folder)
    environment = {
        **NO_AMBIENT_CREDENTIALS,
        **gateway_environment,
        **{name: os.environ[name] for name in ("PATH", "HOME")},
        "PYTHONPATH": str(REPOSITORY),
        "HOST": HOST,
        "MODEL_PATH": "test/runner",
        "MODEL_BUCKET_NAME": "models",
        "COG_MAX_CONCURRENCY": "8",
    }

    async def test() -> None:
        async with gateway_here(environment) as (desk, client):
            # Threads, connections and what is made once are there after these.
            await all_ways(desk, client, 10, "warm")
            before = kept()
            await all_ways(desk, client, EACH, "many")

            def is_as_before() -> bool:
                now = kept()
                # Connections are kept for the next requests, as many as were ever needed at once.
                files = now.pop("files") < before["files"] + EACH
                return files and now == {**now, "tasks": before["tasks"], **NOTHING}

            async with asyncio.timeout(TIMEOUT_S):
                while not is_as_before():  # noqa: ASYNC110 - the last answers are on their way
                    await asyncio.sleep(0.1)
            assert (desk.running, desk.waiting) == (0, 0)

    run(test)
