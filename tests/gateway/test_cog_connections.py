"""Connections to Cog's server are kept for the next prediction, given up where they hang, closed where that cancels.

So are its folders, which it leaves behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from gateway import cog_client, cog_folders
from gateway.cog_client import CogBusyError, CogClient
from gateway.cog_folders import CogFolders
from gateway.event_stream import Event
from tests.gateway.test_cog_client import HEAD, START, Serve, asking, chunk, read_request
from tests.gateway.test_run import until
from tests.gateway.watching import NEVER_S, TIMEOUT_S, run

DONE = chunk(Event("completed", {"status": "succeeded"}).encode())
END = b"0\r\n\r\n"
BUSY = b"HTTP/1.1 409 Conflict\r\nContent-Length: 4\r\n\r\nbusy"
MADE = ["start", "completed"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cog_folders, "COGS_FOLDERS", tmp_path)
    monkeypatch.setattr(cog_folders, "CLEAR_AWAY_EVERY_S", 0.05)
    return tmp_path


def make_folder(folders: Path, name: str) -> Path:
    """As Cog does."""
    for inside in ("inputs", "outputs"):
        (folders / name / inside).mkdir(parents=True)
    return folders / name


def making(folders: Path) -> Serve:
    """A server that makes each prediction, and folders for it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for name in asked_on(reader):
            make_folder(folders, name)
            writer.write(HEAD + chunk(START.encode()) + DONE + END)

    return serve


async def asked_on(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The ids of the predictions that are asked for on a connection, until it is closed."""
    while True:
        try:
            _, _, body = await read_request(reader)
        except asyncio.IncompleteReadError:
            return
        yield body["id"]


async def make(client: CogClient, name: str) -> list[str]:
    """The names of a prediction's events, which are read to `completed` and no further, as a run does."""
    told = []
    async with (
        asyncio.timeout(TIMEOUT_S),
        aclosing(client.predict(name, {})) as events,  # type: ignore[type-var]
    ):
        async for event in events:
            told.append(event.name)
            if event.name == "completed":
                break
    return told


async def leave(client: CogClient, name: str) -> None:
    """Stop reading a prediction's events after the first."""
    async with (
        asyncio.timeout(TIMEOUT_S),
        aclosing(client.predict(name, {})) as events,  # type: ignore[type-var]
    ):
        assert (await anext(events)).name == "start"


def answering(made_on: list[list[str]], answers: dict[str, bytes] | None = None) -> Serve:
    """Makes each prediction, or answers what it is told to; `made_on` has the ids that came on each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[str] = []
        made_on.append(mine)
        async for name in asked_on(reader):
            mine.append(name)
            whole = HEAD + chunk(START.encode()) + DONE + END
            writer.write((answers or {}).get(name, whole))
        writer.close()

    return serve


def test_a_connection_is_used_again_for_the_next_prediction() -> None:
    made_on: list[list[str]] = []

    async def test() -> None:
        async with asking(answering(made_on)) as (client, _):
            assert [await make(client, name) for name in "abc"] == [MADE] * 3

    run(test)
    assert made_on == [["a", "b", "c"]]


def test_a_connection_is_used_again_though_the_end_of_its_events_comes_late() -> None:
    made_on: list[list[str]] = []

    async def test() -> None:
        heard: asyncio.Queue[None] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            mine: list[str] = []
            made_on.append(mine)
            async for name in asked_on(reader):
                mine.append(name)
                writer.write(HEAD + chunk(START.encode()) + DONE)
                await heard.get()
                writer.write(END)
            writer.close()

        async with asking(serve) as (client, _), asyncio.timeout(TIMEOUT_S):
            while all(len(made) < 2 for made in made_on):  # nobody tells when it is free
                assert await make(client, f"prediction-{len(made_on)}") == MADE
                heard.put_nowait(None)

    run(test)


def test_a_connection_is_used_again_after_a_refusal_for_want_of_a_slot() -> None:
    made_on: list[list[str]] = []

    async def test() -> None:
        async with asking(answering(made_on, {"early": BUSY})) as (client, _):
            with pytest.raises(CogBusyError):
                await make(client, "early")
            assert await make(client, "later") == MADE

    run(test)
    assert made_on == [["early", "later"]]


def test_the_connection_of_a_prediction_that_was_left_is_not_used_again() -> None:
    """It is closed, which cancels at Cog (test_cog_client.py)."""
    made_on: list[list[str]] = []

    async def test() -> None:
        unfinished = {"left": HEAD + chunk(START.encode())}
        async with asking(answering(made_on, unfinished)) as (client, _):
            await leave(client, "left")
            assert await make(client, "next") == MADE

    run(test)
    assert made_on == [["left"], ["next"]]


def without_an_end(closed: asyncio.Event) -> Serve:
    """Makes a prediction, and leaves its connection open."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(START.encode()) + DONE)
        await reader.read()
        closed.set()
        writer.close()

    return serve


def test_an_end_that_never_comes_holds_up_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog_client, "LAST_BYTES_S", NEVER_S)

    async def test() -> None:
        closed = asyncio.Event()
        async with asking(without_an_end(closed)) as (client, _):
            assert await make(client, "a") == MADE
            assert not closed.is_set()

    run(test)


def test_a_connection_whose_end_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog_client, "LAST_BYTES_S", 0.05)

    async def test() -> None:
        closed = asyncio.Event()
        async with asking(without_an_end(closed)) as (client, _), asyncio.timeout(TIMEOUT_S):
            assert await make(client, "a") == MADE
            await closed.wait()

    run(test)


@pytest.mark.parametrize("when", ["while nobody asks", "as the next is asked for"])
def test_on_a_connection_that_was_closed_meanwhile_the_next_prediction_is_made_once(
    when: str,
) -> None:
    made: list[str] = []

    async def test() -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async for name in asked_on(reader):
                if name == "next" and not gone.is_set():
                    break
                made.append(name)
                writer.write(HEAD + chunk(START.encode()) + DONE + END)
                if name == "first" and when == "while nobody asks":
                    break
            writer.close()
            await writer.wait_closed()
            gone.set()

        async with asking(serve) as (client, cog):
            assert await make(client, "first") == MADE
            if when == "while nobody asks":
                await gone.wait()
            assert await make(client, "next") == MADE
            assert cog.looks == 0

    run(test)
    assert made == ["first", "next"]


def test_the_folders_of_a_finished_prediction_are_cleared_away(folders: Path) -> None:
    async def test() -> None:
        async with asking(making(folders)) as (client, _):
            assert await make(client, "a/b") == MADE
            await until(lambda: not list(folders.iterdir()))

    run(test)


def test_the_folders_of_a_prediction_that_was_left_are_cleared_away_though_made_late(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cog_folders, "CLEAR_AWAY_EVERY_S", 1.0)

    async def test() -> None:
        is_made = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async for name in asked_on(reader):
                writer.write(HEAD + chunk(START.encode()))
                await reader.read()
                make_folder(folders, name)
                is_made.set()
            writer.close()

        async with asking(serve) as (client, _), asyncio.timeout(TIMEOUT_S):
            await leave(client, "left")
            await is_made.wait()
            await until(lambda: not list(folders.iterdir()))

    run(test)


def test_the_folders_of_a_prediction_that_is_asked_for_again_stay_for_it(folders: Path) -> None:
    async def test() -> None:
        left = CogFolders()
        for name in ("again", "once"):
            make_folder(folders, name)
            left.use(name)
            left.leave(name)
        left.use("again")
        await until(lambda: not (folders / "once").exists())
        assert (folders / "again" / "outputs").exists()
        left.leave("again")
        await until(lambda: not (folders / "again").exists())

    run(test)


def test_at_the_end_all_folders_are_cleared_away_at_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cog_folders, "CLEAR_AWAY_EVERY_S", NEVER_S)

    async def test() -> None:
        async with asking(making(folders)) as (client, _):
            assert await make(client, "last") == MADE
            client.close()

    run(test)
    assert not list(folders.iterdir())


def test_a_folder_that_has_something_in_it_stays(folders: Path) -> None:
    async def test() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async for name in asked_on(reader):
                (make_folder(folders, name) / "outputs" / "image.png").write_bytes(b"image")
                writer.write(HEAD + chunk(START.encode()) + DONE + END)

        async with asking(serve) as (client, _):
            assert await make(client, "a") == MADE
            await until(lambda: not (folders / "a" / "inputs").exists())

    run(test)
    assert (folders / "a" / "outputs" / "image.png").read_bytes() == b"image"
