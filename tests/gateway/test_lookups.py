"""Names that answer late, as strangers may choose them, hold up nobody but those who ask for them.

The system's resolver answers late for some names; the rest is real.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway import addresses
from gateway.addresses import Guard, GuardedTransport, resolve_as_the_system_does
from gateway.webhooks import check_reachable
from tests.support.cog_server import REPOSITORY

PATIENCE_S = 30.0
PUBLIC = "93.184.216.34"
_as_the_system_does = socket.getaddrinfo


class LateNames:
    """Names that end in `.late` have an address once `answering` is set; `.quick` have it now; others are real."""

    def __init__(self) -> None:
        self.answering = threading.Event()
        self.asked: list[str] = []

    def getaddrinfo(self, host: str, port: int, *options: Any, **more: Any) -> Any:
        self.asked.append(host)
        if host.endswith(".late"):
            self.answering.wait(PATIENCE_S)
        if host.endswith((".late", ".quick")):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, port))]
        return _as_the_system_does(host, port, *options, **more)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateNames]:
    names = LateNames()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.answering.set()
    for thread in lookups():
        thread.join(PATIENCE_S)


def lookups() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lookup"]


async def begun(names: LateNames, count: int) -> list[asyncio.Task[list[str]]]:
    """So many late names that are being looked up."""
    guard = Guard()
    tasks = [asyncio.create_task(guard.addresses(f"{number}.late", 443)) for number in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        while len(names.asked) < count:  # noqa: ASYNC110 - what asks are threads
            await asyncio.sleep(0.001)
    return tasks


def test_late_names_hold_up_neither_our_own_names_nor_anothers(names: LateNames) -> None:
    async def asking() -> list[list[str]]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(4))  # as many as uvloop's
        late = await begun(names, addresses.MOST_LOOKUPS - 1)
        async with asyncio.timeout(PATIENCE_S / 2):
            assert await loop.getaddrinfo("localhost", 443)
            assert await Guard().addresses("another.quick", 443) == [PUBLIC]
        assert not any(task.done() for task in late)
        names.answering.set()
        return await asyncio.gather(*late)

    assert asyncio.run(asking()) == [[PUBLIC]] * (addresses.MOST_LOOKUPS - 1)


def test_where_too_many_are_late_the_next_is_as_late(
    names: LateNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "MOST_LOOKUPS", 2)
    monkeypatch.setattr("gateway.webhooks.RESOLVED_WITHIN_S", 0.1)

    async def asking() -> None:
        late = await begun(names, 2)
        await check_reachable(Guard(), "https://checked.quick/")
        async with httpx.AsyncClient(transport=GuardedTransport(), timeout=0.1) as client:
            with pytest.raises(httpx.ConnectTimeout, match="was not resolved in time"):
                await client.get("http://connected.quick/")
        patient = asyncio.create_task(Guard().addresses("patient.quick", 443))
        await asyncio.sleep(0)
        assert len(lookups()) == 2
        names.answering.set()
        assert await asyncio.gather(*late, patient) == [[PUBLIC]] * 3

    asyncio.run(asking())
    assert names.asked == ["0.late", "1.late", "patient.quick"]


def test_a_lookup_that_nobody_waits_for_any_more_gives_its_thread_back(names: LateNames) -> None:
    async def giving_up() -> None:
        [late] = await begun(names, 1)
        late.cancel()
        await asyncio.wait({late})

    asyncio.run(giving_up())
    [thread] = lookups()
    names.answering.set()
    thread.join(PATIENCE_S)
    assert asyncio.run(_quick()) == [PUBLIC]
    for thread in lookups():
        thread.join(PATIENCE_S)
    assert lookups() == []


async def _quick() -> list[str]:
    return list(await resolve_as_the_system_does("another.quick", 443))


def test_a_late_name_does_not_hold_up_the_end_of_the_process() -> None:
    program = """
import asyncio, socket, threading
from gateway.addresses import Guard
socket.getaddrinfo = lambda *_, **__: threading.Event().wait()
async def giving_up():
    async with asyncio.timeout(0.01):
        await Guard().addresses("name.late", 443)
try:
    asyncio.run(giving_up())
except TimeoutError:
    print("given up")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "given up\n", "")
