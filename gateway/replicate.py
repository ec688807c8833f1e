"""Replicate's HTTP API (v1), so that its clients work here with no more changed than where they call.

A prediction that is asked for here goes on in the background, as it does there. How things are told is
replicate_form.py's.
"""

import asyncio
import base64
import hmac
import secrets
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, JsonValue

from gateway import replicate_form as form
from gateway.addresses import Guard
from gateway.callers import Callers
from gateway.cog_api import prefers, read_as, webhook_of
from gateway.desk import Desk, Wanted
from gateway.keys import KeyName
from gateway.refusals import Refused
from gateway.replicate_stream import FINISHED, output_stream
from gateway.schemas import answered, requested, text_answer
from gateway.waiting import until_end
from gateway.webhooks import WebhookEvent
from images.records import PLACE

LONGEST_WAIT_S = 60
PER_PAGE = 20  # each is a read from the bucket
# A prediction that runs here ends a moment after it is cancelled, and its caller may see that.
CANCELED_WITHIN_S = 5.0
GOES_ON = ("draining", "taken_over")


class ReplicatePredictionRequest(BaseModel):
    """The body that asks for a prediction. Fields of Replicate's that mean nothing here are ignored."""

    model_config = ConfigDict(extra="ignore")

    version: str | None = None
    model: str | None = None
    input: dict[str, JsonValue] = {}
    webhook: str | None = None
    webhook_completed: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None


def new_id() -> str:
    """Of the look of Replicate's: 128 random bits as 26 lower-case letters and digits."""
    return base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def wait_of(request: Request) -> float | None:
    """How long the caller wants to wait for the end; None for not at all."""
    wanted = prefers(request).get("wait")
    if wanted is None:
        return None
    # Longer than any wait is as good as none that can be read: Python refuses to read numbers of thousands of digits.
    is_number = wanted.isdecimal() and len(wanted) < 10
    return float(min(max(int(wanted), 1), LONGEST_WAIT_S)) if is_number else LONGEST_WAIT_S


class Replicate:
    """What the routes do."""

    def __init__(self, desk: Desk, callers: Callers, guard: Guard, models: form.Models) -> None:
        self.desk = desk
        self._callers = callers
        self._guard = guard
        self._models = models

    def told(self, answer: dict[str, Any], request: Request) -> dict[str, Any]:
        """Cog's answer as Replicate tells it."""
        seal = self._callers.seal(answer["id"]) if self._callers.need_key else ""
        return form.prediction(answer, form.base_url(request), self._models, seal)

    async def found(self, prediction_id: str) -> dict[str, Any]:
        """Cog's answer. Raises Refused (404)."""
        answer = await self.desk.get(prediction_id)
        if answer is None:
            raise Refused(
                HTTPStatus.NOT_FOUND, "there is no prediction of this id", reason="unknown"
            )
        return answer

    async def predict(
        self, request: Request, caller: KeyName | None, path: str | None = None
    ) -> Response:
        """`path` is the model that the URL names. Raises Refused."""
        asked = await read_as(request, ReplicatePredictionRequest)
        model = self._models.named(asked.version or asked.model) if path is None else path
        url, events = asked.webhook, asked.webhook_events_filter
        if url is None and asked.webhook_completed is not None:
            url, events = asked.webhook_completed, ["completed"]
        wanted = Wanted(
            self._models.input_for(model, asked.input),
            id=(prediction_id := new_id()),
            webhook=await webhook_of(url, events, self._guard),
            background=True,
            caller=caller,
            source="replicate",
        )
        try:
            prediction = await self.desk.submit(wanted)
            if (seconds := wait_of(request)) is not None:
                await until_end(self.desk, prediction, request, seconds)
            answer = prediction.answer()
        except Refused as refused:
            # This server stops. If the prediction is recorded, another goes on with it, and a caller who is told of
            # an error would ask for a second one.
            recorded = await self.desk.get(prediction_id) if refused.reason in GOES_ON else None
            if recorded is None:
                raise
            answer = recorded
        if answer["status"] not in FINISHED:
            # Replicate's clients go on to ask only while a create that waited says this.
            answer["status"] = "starting"
        return JSONResponse(self.told(answer, request), HTTPStatus.CREATED)

    async def cancel(self, request: Request, prediction_id: str) -> Response:
        """Raises Refused (404)."""
        running = self.desk.find(prediction_id)
        if await self.desk.cancel(prediction_id) and running is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(CANCELED_WITHIN_S):
                    await running.ended()
        return JSONResponse(self.told(await self.found(prediction_id), request))

    async def follow(self, request: Request, prediction_id: str, seal: str = "") -> None:
        """A dependency. Replicate's JavaScript client follows a stream without its key, but the URL has a seal."""
        if not hmac.compare_digest(self._callers.seal(prediction_id).encode(), seal.encode()):
            await self._callers.enter(request)


def replicate_router(desk: Desk, callers: Callers, guard: Guard, models: form.Models) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1", route_class=form.ReplicateRoute, tags=["replicate"])
    owners = Path(examples=[owner for owner, _ in models.addressable()])
    names = Path(examples=[name for _, name in models.addressable()])
    enter, spend = Depends(callers.enter), Depends(callers.spend)
    asks = requested("ReplicatePredictionRequest")

    replicate = Replicate(desk, callers, guard, models)

    @router.post(
        "/predictions",
        summary="Make a prediction",
        status_code=HTTPStatus.CREATED,
        openapi_extra=asks,
        responses=answered(HTTPStatus.CREATED, "ReplicatePrediction"),
    )
    async def create(request: Request, caller: Annotated[KeyName | None, spend]) -> Response:
        return await replicate.predict(request, caller)

    @router.post(
        "/models/{owner}/{name}/predictions",
        summary="Make a prediction by this model",
        status_code=HTTPStatus.CREATED,
        openapi_extra=asks,
        responses=answered(HTTPStatus.CREATED, "ReplicatePrediction"),
    )
    async def create_by(
        request: Request,
        caller: Annotated[KeyName | None, spend],
        owner: Annotated[str, owners],
        name: Annotated[str, names],
    ) -> Response:
        return await replicate.predict(request, caller, models.found(owner, name))

    @router.get(
        "/predictions",
        summary="Predictions, newest first",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicatePredictions"),
    )
    async def recent(
        request: Request, cursor: Annotated[str | None, Query(pattern=PLACE)] = None
    ) -> Response:
        answers, more = await desk.recent(PER_PAGE, cursor)
        here = f"{form.base_url(request)}/v1/predictions"
        next_url = None if more is None else f"{here}?{urlencode({'cursor': more})}"
        return JSONResponse(
            form.page([replicate.told(answer, request) for answer in answers], next_url)
        )

    @router.get(
        "/predictions/{prediction_id}",
        summary="What became of a prediction",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicatePrediction"),
    )
    async def get(request: Request, prediction_id: str) -> Response:
        return JSONResponse(replicate.told(await replicate.found(prediction_id), request))

    @router.post(
        "/predictions/{prediction_id}/cancel",
        summary="Cancel a prediction",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicatePrediction"),
    )
    async def cancel(request: Request, prediction_id: str) -> Response:
        return await replicate.cancel(request, prediction_id)

    @router.get(
        "/predictions/{prediction_id}/stream",
        summary="A prediction's output as it comes",
        dependencies=[Depends(replicate.follow)],
        response_class=Response,
        responses=text_answer("text/event-stream"),
    )
    async def stream(request: Request, prediction_id: str) -> Response:
        return output_stream(desk, prediction_id, await replicate.found(prediction_id), request)

    return router
