"""`/predict`, for the simplest client: a prompt in, and the image itself out, in one request.

The images are in the bucket as ever; here they are read back from it for who does not want to follow a URL.
"""

import asyncio
import base64
import logging
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from gateway.callers import Callers
from gateway.cog_api import read_json
from gateway.desk import Desk, Wanted
from gateway.keys import KeyName
from gateway.prediction import Prediction
from gateway.refusals import problem, wrong_input
from gateway.schemas import answered, ref
from gateway.waiting import until_end
from images.errors import ImagesError
from images.store import ReadImage

# Its caller has hung up, so only metrics and traces see it: nginx's number for that.
CLIENT_CLOSED_REQUEST = 499

_log = logging.getLogger(__name__)


def simple_router(desk: Desk, callers: Callers) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post(
        "/predict",
        summary="Make images, and get them in the answer",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": ref("Input")}},
            }
        },
        responses=answered(HTTPStatus.OK, "SimpleAnswer")
        | {HTTPStatus.BAD_GATEWAY.value: {"description": "Its images cannot be read"}},
    )
    async def predict(
        request: Request, caller: Annotated[KeyName | None, Depends(callers.spend)]
    ) -> Response:
        given = _inputs(await read_json(request))
        prediction = await desk.submit(Wanted(given, caller=caller, source="predict"))
        await until_end(desk, prediction, request)
        if prediction.completed_at is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if prediction.status != "succeeded":
            return _not_made(prediction)
        urls = prediction.output if isinstance(prediction.output, list) else [prediction.output]
        try:
            images = await asyncio.gather(*(desk.ledger.image(str(url)) for url in urls))
        except ImagesError as error:
            _log.error("%s", error)
            detail = "the images are made and cannot be read; the server's log says why"
            return JSONResponse(
                {"detail": f"{detail}. GET /predictions/{prediction.id} has their URLs"},
                HTTPStatus.BAD_GATEWAY,
            )
        # A megabyte in base64 takes long enough to keep others waiting.
        return await asyncio.to_thread(_answer, prediction, images)

    return router


def _inputs(body: Any) -> dict[str, Any]:
    """The inputs, which may also come as Cog's API has them: `{"input": {…}}`. Raises Refused (422)."""
    if isinstance(body, dict) and body.keys() == {"input"}:
        body = body["input"]
    if not isinstance(body, dict):
        raise wrong_input(problem('must be an object, such as {"prompt": "a fox"}'))
    return body


def _answer(prediction: Prediction, images: list[ReadImage]) -> Response:
    encoded = [base64.b64encode(image.data).decode() for image in images]
    told: dict[str, Any] = {
        "id": prediction.id,
        "image": encoded[0] if encoded else "",
        "images": encoded,
        "content_type": images[0].content_type if images else "",
    }
    known = ("seed", "model_version", "timings")
    return JSONResponse(
        told | {name: prediction.metrics[name] for name in known if name in prediction.metrics}
    )


def _not_made(prediction: Prediction) -> Response:
    """With its error in words, as nobody looks for a status in a body here."""
    if prediction.status == "canceled":
        return JSONResponse(
            {"detail": prediction.error or "it was canceled", "id": prediction.id},
            HTTPStatus.CONFLICT,
        )
    return JSONResponse(
        {"detail": prediction.error or "it failed without a word", "id": prediction.id},
        HTTPStatus.INTERNAL_SERVER_ERROR,
    )
