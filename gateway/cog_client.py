"""Asks Cog's server for predictions, always by its event stream: that alone says how far one is, and ends with it.

It knows Cog's HTTP interface (0.23); who may ask, in which order, and what is kept is the desk's.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol

import aiohttp

from gateway.cog_folders import CogFolders
from gateway.event_stream import CONTENT_TYPE, Event, EventReader
from gateway.inputs import Inputs
from gateway.refusals import wrong_input
from images.prediction import record_name

# What Cog 0.23 says of a prediction whose worker died under it, and of one that a dead worker was to be given: it is
# told as started, and as failed.
_WORKER_CRASHED = "Worker crashed"
_NEVER_SENT = "Failed to send request: "
# After a prediction its caller waits for its record. By then that is on its way.
FREE_AFTER_S = 0.001
LAST_BYTES_S = 1.0
CONNECT_S = 10.0
DOCUMENT_S = 10.0
# Servers hold a small piece back until the last one is acknowledged (Nagle), and Linux acknowledges late, after 40 ms,
# on a connection that has had a few: the end of a prediction would wait for that. To be asked for again and again.
_ACKNOWLEDGE_AT_ONCE: int | None = getattr(socket, "TCP_QUICKACK", None)


class CogBusyError(Exception):
    """Every slot of Cog's server is taken; one frees a moment after its answer went out."""


class CogLostError(Exception):
    """Cog's server, or its worker, was gone before the prediction was finished: it may be asked for again."""


class CogNeverBeganError(CogLostError):
    """The worker was dead before it was given the prediction, which cannot be what it died of."""


class Cog(Protocol):
    """Where Cog's server is, and who wants to know that it may be dead."""

    @property
    def address(self) -> str: ...
    def look(self) -> None: ...


def new_session() -> aiohttp.ClientSession:
    """The HTTP client of a CogClient. To be made on the event loop, and closed.

    aiohttp and not httpx: for each prediction it takes 0.2 ms of a core where httpx takes 0.9 (2 cores of 2026). Its
    connections are kept, which a prediction is answered 0.5 ms sooner for. On one that was closed meanwhile it sends
    the PUT again by itself; Cog takes that for the same prediction.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class CogClient:
    """Asks for predictions, and what they may be; `session` is `new_session()`."""

    def __init__(self, cog: Cog, session: aiohttp.ClientSession) -> None:
        self._cog = cog
        self._session = session
        self._folders = CogFolders()
        self._freeing: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Clear away what is left of the predictions, with Cog's server gone."""
        self._folders.close()

    async def predict(
        self, prediction_id: str, given: dict[str, Any], context: dict[str, Any] | None = None
    ) -> AsyncIterator[Event]:
        """The events of a prediction, the last of them `completed`. To stop reading cancels it.

        Raises CogBusyError, CogLostError, or Refused where Cog refuses the input.
        """
        # Cog makes folders of the ids it is given, wherever `/` and `..` lead, and one it cannot make costs it a slot
        # for good. A record's name is safe.
        name = record_name(prediction_id)
        answer, is_over = None, False
        body: dict[str, Any] = {"id": name, "input": given}
        if context:
            body["context"] = context
        self._folders.use(name)
        try:
            answer = await self._session.put(
                f"{self._cog.address}/predictions/{name}",
                data=json.dumps(body).encode(),
                headers={"Accept": CONTENT_TYPE, "Content-Type": "application/json"},
            )
            if answer.status != HTTPStatus.OK:
                raise self._refusal(answer.status, await answer.read())
            reader = EventReader()
            connection = _socket_of(answer)
            async for piece in answer.content.iter_any():
                _acknowledge(connection)
                for event in reader.feed(piece):
                    if event.data.get("id") == name:
                        event.data["id"] = prediction_id
                    if event.name != "completed":
                        yield event
                    else:
                        self._check_worker(event)
                        is_over = True
                        yield event
                        return
            raise ConnectionError("its events ended before the prediction did")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._cog.look()
            raise CogLostError(
                f"Cog's server broke off ({type(error).__name__}: {error})"
            ) from error
        finally:
            if answer is not None and is_over:
                asyncio.get_running_loop().call_later(FREE_AFTER_S, self._soon_free, answer)
            elif answer is not None:
                answer.close()
            self._folders.leave(name)

    async def document(self) -> dict[str, Any] | None:
        """Cog's OpenAPI document; None while it has none. Raises CogLostError."""
        try:
            async with self._session.get(
                f"{self._cog.address}/openapi.json",
                timeout=aiohttp.ClientTimeout(total=DOCUMENT_S),
            ) as answer:
                if answer.status != HTTPStatus.OK:
                    return None
                document = await answer.json()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._cog.look()
            raise CogLostError(f"{type(error).__name__}: {error}") from error
        return document if isinstance(document, dict) else None

    async def inputs(self) -> Inputs:
        """What the model takes. Raises CogLostError."""
        return Inputs(await self.document() or {})

    def _soon_free(self, answer: aiohttp.ClientResponse) -> None:
        freeing = asyncio.create_task(_free(answer))
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)

    def _check_worker(self, completed: Event) -> None:
        """Raises CogLostError where it is not the prediction that failed."""
        error = completed.data.get("error")
        if error == _WORKER_CRASHED:
            self._cog.look()
            raise CogLostError("the worker of Cog's server died")
        if isinstance(error, str) and error.startswith(_NEVER_SENT):
            self._cog.look()
            raise CogNeverBeganError("the worker of Cog's server was dead already")

    def _refusal(self, status: int, body: bytes) -> Exception:
        text = body.decode(errors="replace")[:500] or HTTPStatus(status).phrase
        match status:
            case HTTPStatus.CONFLICT | HTTPStatus.SERVICE_UNAVAILABLE:
                # A dead worker's server says so as well: whether it lives is found out by the look.
                self._cog.look()
                return CogBusyError(text)
            case (
                HTTPStatus.BAD_REQUEST
                | HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                | HTTPStatus.UNPROCESSABLE_ENTITY
            ):
                # A number that is none in Rust, say: asked for again, it would be refused again.
                return wrong_input(_detail(body, text))
            case _:
                return CogLostError(f"Cog's server answered with {status}: {text}")


async def _free(answer: aiohttp.ClientResponse) -> None:
    """Read it to its end, so that its connection may be used again."""
    try:
        async with asyncio.timeout(LAST_BYTES_S):
            await answer.content.read()
    except (aiohttp.ClientError, OSError):
        pass
    answer.release()


def _socket_of(answer: aiohttp.ClientResponse) -> socket.socket | None:
    connection = answer.connection
    transport = None if connection is None else connection.transport
    return None if transport is None else transport.get_extra_info("socket")


def _acknowledge(connection: socket.socket | None) -> None:
    if connection is not None and _ACKNOWLEDGE_AT_ONCE is not None:
        with suppress(OSError):  # it was closed meanwhile, which whoever reads from it learns
            connection.setsockopt(socket.IPPROTO_TCP, _ACKNOWLEDGE_AT_ONCE, 1)


def _detail(body: bytes, text: str) -> str | list[dict[str, Any]]:
    try:
        detail: str | list[dict[str, Any]] = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return text
    return detail


def merge_metric(metrics: dict[str, Any], told: dict[str, Any]) -> None:
    """Bring a `metric` event into `metrics`, as Cog does: a dotted name is a place inside, null takes it away."""
    name, value, mode = told.get("name"), told.get("value"), told.get("mode", "replace")
    if not isinstance(name, str) or not name:
        return
    *outer, last = name.split(".")
    place = metrics
    for part in outer:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = place[part] = {}
        place = inner
    before = place.get(last)
    if value is None:
        place.pop(last, None)
    elif mode == "incr" and isinstance(before, int | float) and isinstance(value, int | float):
        place[last] = before + value
    elif mode == "append":
        place[last] = [*(before if isinstance(before, list) else []), value]
    else:
        place[last] = value
