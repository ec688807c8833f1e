"""How callers wait for a prediction: until its end, for a while, or event by event; and how they leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from http import HTTPStatus

from fastapi import Request
from fastapi.responses import StreamingResponse

from gateway.desk import Desk
from gateway.event_stream import CONTENT_TYPE, KEEP_ALIVE, Event
from gateway.prediction import Prediction
from gateway.refusals import REASON

KEEP_ALIVE_S = 15.0
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def until_end(
    desk: Desk, prediction: Prediction, request: Request, seconds: float | None = None
) -> None:
    """Until it is over, the caller hangs up, or `seconds` have passed. Raises Refused."""
    with desk.watching(prediction):
        ended = asyncio.create_task(prediction.ended())
        gone = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait({ended, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            gone.cancel()
    if prediction.refusal is not None:
        raise prediction.refusal


def stream(
    desk: Desk,
    prediction: Prediction,
    request: Request,
    encode: Callable[[Event], bytes] = Event.encode,
) -> StreamingResponse:
    """Its events, from the first on. An event of which `encode` makes nothing is left out."""
    return StreamingResponse(
        _encoded(desk, prediction, request, encode), media_type=CONTENT_TYPE, headers=UNBUFFERED
    )


async def _encoded(
    desk: Desk, prediction: Prediction, request: Request, encode: Callable[[Event], bytes]
) -> AsyncIterator[bytes]:
    with desk.watching(prediction):
        events = aiter(prediction.events())
        gone = asyncio.create_task(_hung_up(request))
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait(
                    {coming, gone}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    event = coming.result()
                    if event is None or event.name == "completed":
                        must_ask_again = _must_ask_again(prediction, request)
                        if event is None or must_ask_again:
                            return
                    if encoded := encode(event):
                        yield encoded
                    coming = asyncio.ensure_future(anext(events, None))
                elif gone.done():
                    return
                else:
                    yield KEEP_ALIVE
        finally:
            gone.cancel()
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await coming


def _must_ask_again(prediction: Prediction, request: Request) -> bool:
    """Whether who waits for an answer is refused for now. A stream has its status already: it ends, and says no end."""
    refusal = prediction.refusal
    if refusal is None or refusal.status != HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    request.scope[REASON] = refusal.reason
    return True


async def _hung_up(request: Request) -> None:
    """Returns when the caller has. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
