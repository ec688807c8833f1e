"""Cog's own HTTP interface, for clients that know it, and the two questions it has no answer to: what became of a
prediction, and which there are.

Bodies and statuses are Cog's (0.23). What a prediction goes through is the desk's.
"""

import json
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from gateway.addresses import AddressRefused, Guard
from gateway.callers import Callers
from gateway.desk import Desk, Wanted
from gateway.event_stream import CONTENT_TYPE, asks_for_events
from gateway.refusals import REASON, Refused, problem, wrong_input
from gateway.schemas import answered, requested
from gateway.waiting import stream, until_end
from gateway.webhooks import WebhookEvent, check_reachable, check_url
from images.prediction import Webhook
from images.records import PLACE

MOST_LISTED = 100

_BY_ID = {
    "parameters": [
        {"name": "prediction_id", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
}

Asked = TypeVar("Asked", bound=BaseModel)


class PredictionRequest(BaseModel):
    """The body of Cog's requests. Other fields are ignored, as Cog does."""

    model_config = ConfigDict(extra="ignore")

    input: dict[str, JsonValue] = {}
    id: str | None = Field(None, min_length=1)
    context: dict[str, str] | None = None
    webhook: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None


async def read_json(request: Request) -> Any:
    """The body. Raises Refused: 415 for what is not said to be JSON, 400 for what is none."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON: send it with `Content-Type: application/json`",
            reason="input",
        )
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(
            HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}"[:300], reason="input"
        ) from None


async def read_as(request: Request, form: type[Asked]) -> Asked:
    """The body as what it has to be. Raises Refused (400, 415, 422)."""
    body = await read_json(request)
    try:
        return form.model_validate(body)
    except ValidationError as error:
        raise wrong_input(
            [
                {"loc": ["body", *detail["loc"]], "msg": detail["msg"], "type": detail["type"]}
                for detail in error.errors(include_input=False, include_url=False)
            ]
        ) from None


async def webhook_of(
    url: str | None, events: Sequence[WebhookEvent] | None, guard: Guard
) -> Webhook | None:
    """Where to tell of it, if that may be told. Raises Refused (422)."""
    if url is None:
        return None
    try:
        check_url(url)
        await check_reachable(guard, url)
        return Webhook(url=url, events_filter=None if events is None else tuple(events))
    except AddressRefused as error:
        raise wrong_input(problem(str(error), "webhook")) from None
    except ValueError as error:
        raise wrong_input(problem(f"the webhook {error}", "webhook")) from None


def prefers(request: Request) -> dict[str, str]:
    """What `Prefer` asks for (RFC 7240): names in lower case, with what follows an equals sign."""
    asked: dict[str, str] = {}
    for header in request.headers.getlist("prefer"):
        for part in header.replace(";", ",").split(","):
            name, _, value = part.partition("=")
            asked.setdefault(name.strip().lower(), value.strip().strip('"'))
    return asked


class _Direct(APIRoute):
    """Gives the request to its endpoint as it came: what it depends on (its caller's key), the endpoint asks itself.

    `dependencies` of such a route are written into the document, and never run. FastAPI's own way there takes 0.4 ms
    of the 5 that the gateway may take for a prediction (2 cores of 2026).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def cog_router(desk: Desk, callers: Callers, guard: Guard) -> APIRouter:
    """The routes."""
    router = APIRouter()
    predicted = answered(HTTPStatus.OK, "PredictionResponse", also=CONTENT_TYPE) | answered(
        HTTPStatus.ACCEPTED, "PredictionResponse"
    )

    async def predict(request: Request) -> Response:
        caller = await callers.spend(request)
        given_id = request.path_params.get("prediction_id")
        asked = await read_as(request, PredictionRequest)
        if given_id is not None and asked.id not in (None, given_id):
            raise wrong_input(problem("prediction ID must match the ID supplied in the URL", "id"))
        prediction_id = given_id or asked.id
        background = "respond-async" in prefers(request)
        running_before = prediction_id is not None and desk.would_join(prediction_id)
        prediction = await desk.submit(
            Wanted(
                asked.input,
                id=prediction_id,
                webhook=await webhook_of(asked.webhook, asked.webhook_events_filter, guard),
                background=background,
                caller=caller,
                context=dict(asked.context or {}),
                source="page" if request.headers.get("x-requested-by") == "page" else "cog",
            )
        )
        if asks_for_events(request.headers.get("accept")):
            return stream(desk, prediction, request)
        is_running = not prediction.finished
        if is_running and (background or running_before or desk.is_elsewhere(prediction)):
            return JSONResponse(prediction.answer(), HTTPStatus.ACCEPTED)
        await until_end(desk, prediction, request)
        goes_on = prediction.completed_at is None  # elsewhere, as this server stops
        return JSONResponse(prediction.answer(), HTTPStatus.ACCEPTED if goes_on else HTTPStatus.OK)

    for path, method, summary, more in (
        ("/predictions", "POST", "Make a prediction", {}),
        ("/predictions/{prediction_id:path}", "PUT", "Make a prediction of this id, once", _BY_ID),
    ):
        router.add_api_route(
            path,
            predict,
            methods=[method],
            summary=summary,
            dependencies=[Depends(callers.spend)],
            openapi_extra=requested("PredictionRequest") | more,
            responses=predicted,
            route_class_override=_Direct,
        )

    @router.post(
        "/predictions/{prediction_id:path}/cancel",
        summary="Cancel a prediction",
        responses={HTTPStatus.NOT_FOUND.value: {"description": "There is none to cancel"}},
        dependencies=[Depends(callers.enter)],
    )
    async def cancel(request: Request, prediction_id: str) -> Response:
        found = await desk.cancel(prediction_id)
        if not found:
            request.scope[REASON] = "unknown"
        return JSONResponse({}, HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)

    @router.get(
        "/predictions",
        summary="Predictions, newest first",
        dependencies=[Depends(callers.enter)],
        responses=answered(HTTPStatus.OK, "Predictions"),
    )
    async def recent(
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
        before: Annotated[str | None, Query(pattern=PLACE)] = None,
    ) -> Response:
        answers, more = await desk.recent(limit, before)
        return JSONResponse({"predictions": answers, "before": more})

    @router.get(
        "/predictions/{prediction_id:path}",
        summary="What became of a prediction",
        dependencies=[Depends(callers.enter)],
        responses=answered(HTTPStatus.OK, "PredictionResponse"),
    )
    async def get(prediction_id: str) -> Response:
        answer = await desk.get(prediction_id)
        if answer is None:
            raise Refused(
                HTTPStatus.NOT_FOUND, "there is no prediction of this id", reason="unknown"
            )
        return JSONResponse(answer)

    return router
