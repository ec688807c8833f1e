"""Asks Cog's server for predictions, always by its event stream: that alone says how far one is, and ends with it.

It knows Cog's HTTP interface (0.23); who may ask, in which order, and what is kept is the desk's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from gateway.event_stream import CONTENT_TYPE, Event, EventReader
from gateway.inputs import Inputs
from gateway.loopback import BrokenOffError, request
from gateway.refusals import wrong_input

# What Cog 0.23 says of a prediction whose worker died under it.
_WORKER_CRASHED = "Worker crashed"


class CogBusyError(Exception):
    """Every slot of Cog's server is taken; one frees a moment after its answer went out."""


class CogLostError(Exception):
    """Cog's server, or its worker, was gone before the prediction was finished: it may be asked for again."""


class Cog(Protocol):
    """Where Cog's server is, and who wants to know that it may be dead."""

    @property
    def address(self) -> str: ...
    def look(self) -> None: ...


class CogClient:
    """One HTTP client for all predictions; `client` has to allow as many connections as there are slots, and a few."""

    def __init__(self, cog: Cog, client: httpx.AsyncClient) -> None:
        self._cog = cog
        self._client = client

    async def predict(
        self, prediction_id: str, given: dict[str, Any], context: dict[str, Any] | None = None
    ) -> AsyncIterator[Event]:
        """The events of a prediction, the last of them `completed`. To stop reading cancels it.

        Raises CogBusyError, CogLostError, or Refused where Cog refuses the input.
        """
        body: dict[str, Any] = {"id": prediction_id, "input": given}
        if context:
            body["context"] = context
        try:
            async with request(
                "PUT",
                f"{self._cog.address}/predictions/{quote(prediction_id, safe='')}",
                json.dumps(body).encode(),
                {"Accept": CONTENT_TYPE, "Content-Type": "application/json"},
            ) as answer:
                if answer.status != HTTPStatus.OK:
                    raise self._refusal(
                        answer.status, b"".join([piece async for piece in answer.pieces()])
                    )
                reader = EventReader()
                async with aclosing(answer.pieces()) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        for event in reader.feed(piece):
                            if event.name != "completed":
                                yield event
                            elif event.data.get("error") == _WORKER_CRASHED:
                                self._cog.look()
                                raise CogLostError("the worker of Cog's server died")
                            else:
                                yield event
                                return
            raise BrokenOffError("its events ended before the prediction did")
        except (OSError, ValueError) as error:
            self._cog.look()
            raise CogLostError(
                f"Cog's server broke off ({type(error).__name__}: {error})"
            ) from error

    async def cancel(self, prediction_id: str) -> None:
        """Ask for it; that it is over is told by its events."""
        try:
            await self._client.post(
                f"{self._cog.address}/predictions/{quote(prediction_id, safe='')}/cancel",
                timeout=5.0,
            )
        except httpx.HTTPError:
            self._cog.look()

    async def document(self) -> dict[str, Any] | None:
        """Cog's OpenAPI document; None while it has none. Raises CogLostError."""
        try:
            answer = await self._client.get(f"{self._cog.address}/openapi.json", timeout=10.0)
            if answer.status_code != HTTPStatus.OK:
                return None
            document = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            self._cog.look()
            raise CogLostError(f"{type(error).__name__}: {error}") from error
        return document if isinstance(document, dict) else None

    async def inputs(self) -> Inputs:
        """What the model takes. Raises CogLostError."""
        return Inputs(await self.document() or {})

    def _refusal(self, status: int, body: bytes) -> Exception:
        text = body.decode(errors="replace")[:500] or HTTPStatus(status).phrase
        match status:
            case HTTPStatus.CONFLICT | HTTPStatus.SERVICE_UNAVAILABLE:
                # A dead worker's server says so as well: whether it lives is found out by the look.
                self._cog.look()
                return CogBusyError(text)
            case HTTPStatus.UNPROCESSABLE_ENTITY:
                return wrong_input(_detail(body, text))
            case _:
                return CogLostError(f"Cog's server answered with {status}: {text}")


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
