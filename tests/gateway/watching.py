"""Cog's real server under a `CogProcess`, with a record of all that becomes of it, for the tests of that."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.cog_client import new_session
from gateway.cog_process import CogProcess
from gateway.cog_status import State, Status
from gateway.patience import Patience
from tests.support.process_groups import members_of_group, processes_of_group

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"
RUNNER = "runner_for_cog_process.py:Runner"
NEVER_S = 3600.0
TIMEOUT_S = 90.0

# Short where a test waits for it, and never where it must not come.
QUICK = Patience(
    poll_starting_s=0.05,
    poll_s=0.05,
    first_pause_s=0.05,
    longest_pause_s=0.05,
    setup_first_pause_s=0.05,
    setup_longest_pause_s=0.05,
    good_life_s=NEVER_S,
)


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return inherited | {"COG_PREDICT_TYPE_STUB": RUNNER} | variables


class Watched:
    """A CogProcess that runs, and all that became of it."""

    def __init__(self, cog: CogProcess, client: httpx.AsyncClient) -> None:
        self.cog = cog
        self.client = client
        self.seen: list[Status] = [cog.status]
        self.groups: set[int] = set()
        self._recording = asyncio.create_task(self._record())
        self.running = asyncio.create_task(cog.run())

    async def _record(self) -> None:
        while self.seen[-1].state is not State.STOPPED:
            self.seen.append(await self.cog.wait_for_change(self.seen[-1]))
            if self.cog.pid is not None:
                self.groups.add(self.cog.pid)

    async def until(self, *states: State, restarts: int = 0) -> Status:
        status = self.cog.status
        async with asyncio.timeout(TIMEOUT_S):
            while status.state not in states or status.restarts < restarts:
                status = await self.cog.wait_for_change(status)
        return status

    async def predict(self, prompt: str, seconds: float = 0.0) -> dict[str, Any]:
        answer = await self.client.post(
            f"{self.cog.address}/predictions",
            json={"input": {"prompt": prompt, "seconds": seconds}},
            timeout=TIMEOUT_S,
        )
        body: dict[str, Any] = answer.json()
        return body

    def states(self) -> list[State]:
        return [status.state for status in self.seen]

    async def end(self) -> None:
        await self.cog.stop(0)
        await asyncio.gather(self.running, return_exceptions=True)
        await self._recording
        assert self.cog.status.state is State.STOPPED
        assert self.cog.pid is None
        for group in self.groups:
            assert processes_of_group(group) == []


@asynccontextmanager
async def watched(
    patience: Patience = QUICK, *, cwd: Path = SUPPORT, **arguments: Any
) -> AsyncIterator[Watched]:
    arguments.setdefault("environment", environment())
    async with httpx.AsyncClient(trust_env=False) as client, new_session() as session:
        cog = CogProcess(session, cwd=cwd, patience=patience, **arguments)
        running = Watched(cog, client)
        try:
            yield running
        finally:
            await running.end()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def line_of(read: Callable[[], str], text: str) -> None:
    """Return when `text` has been read."""
    seen = ""
    async with asyncio.timeout(TIMEOUT_S):
        while text not in seen:
            seen += read()
            await asyncio.sleep(0.02)


def worker_of(cog: CogProcess) -> int:
    assert cog.pid is not None
    (worker,) = members_of_group(cog.pid).keys() - {cog.pid}
    return worker
