"""The gateway's HTTP application: which routes there are, and what stands before all of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gateway.addresses import Guard
from gateway.bodies import BodyLimits
from gateway.callers import Callers
from gateway.cog_api import cog_router
from gateway.connections import SECURITY_HEADERS
from gateway.desk import Desk
from gateway.documents import Documents
from gateway.page import page_router
from gateway.refusals import REASON, Refused
from gateway.replicate import replicate_router
from gateway.replicate_form import Models
from gateway.replicate_models import replicate_models_router
from gateway.schemas import text_answer
from gateway.settings import GatewaySettings
from gateway.simple import simple_router
from gateway.state import ColdStartFile, state_router

_EXPOSED = ["Retry-After", "WWW-Authenticate", "Location"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the routes speak for; made in server.py."""

    settings: GatewaySettings
    desk: Desk
    cold_start: ColdStartFile
    guard: Guard


def build(parts: Parts) -> Any:
    """The ASGI application."""
    settings, desk = parts.settings, parts.desk
    callers = Callers(settings.keys, settings.rate)
    app = FastAPI(
        title="Lightning in a Bucket",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # Its spans would hold ids and queries. Ours (tracing.py) do not, and cost nothing where nobody looks.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_exception_handler(Refused, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _plain)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)
    # Its routes are tried in this order, and these are what most ask for.
    app.include_router(cog_router(desk, callers, parts.guard))
    app.include_router(state_router(desk, callers, parts.cold_start, settings.model_path))
    documents = Documents(app, desk, callers)
    app.include_router(documents.router())
    app.include_router(_metrics_router(desk, callers, parts))
    app.include_router(page_router(image_origins(settings)))
    models = Models(settings.model_paths, parts.cold_start)
    app.include_router(replicate_router(desk, callers, parts.guard, models))
    app.include_router(replicate_models_router(desk, callers, models, documents))
    app.include_router(simple_router(desk, callers))

    outermost: Any = BodyLimits(
        app, most_bytes=settings.most_body_bytes, seconds=settings.body_seconds
    )
    if settings.cors_origins:
        outermost = CORSMiddleware(
            outermost,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["Authorization", "Content-Type", "Prefer"],
            expose_headers=_EXPOSED,
        )
    return Observed(outermost, app, desk)


class Observed:
    """The outermost layer: counts, traces, and puts the security headers on every answer."""

    def __init__(self, app: Any, inner: FastAPI, desk: Desk) -> None:
        self._app = app
        self.state = inner.state
        self._desk = desk

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Whatever can be got can be asked for its head: uvicorn, which keeps the scope as it came, leaves the body out.
        method = scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        started = time.perf_counter()
        status, is_answered = HTTPStatus.INTERNAL_SERVER_ERROR.value, False

        async def send_with_headers(message: Any) -> None:
            nonlocal status, is_answered
            if message["type"] == "http.response.start":
                status, is_answered = message["status"], True
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in SECURITY_HEADERS if header[0] not in present),
                ]
            await send(message)

        with self._desk.tracing.request(method, Headers(scope=scope)) as span:
            try:
                await self._app(scope, receive, send_with_headers)
            except asyncio.CancelledError:  # uvicorn's, when the time for last answers is over
                if is_answered:
                    raise
                scope[REASON] = "draining"
                await _stopped()(scope, receive, send_with_headers)
            finally:
                route = getattr(scope.get("route"), "path", "").replace(":path}", "}")
                span.answered(route, status)
                self._desk.metrics.http(method, route, status, time.perf_counter() - started)
                if REASON in scope:
                    self._desk.metrics.refused(scope[REASON])


def _metrics_router(desk: Desk, callers: Callers, parts: Parts) -> APIRouter:
    needs = [] if parts.settings.metrics_without_key else [Depends(callers.enter)]
    router = APIRouter(dependencies=needs)

    @router.get(
        "/metrics",
        summary="What is counted, for Prometheus",
        response_class=Response,
        responses=text_answer("text/plain", "application/openmetrics-text"),
    )
    async def metrics(request: Request) -> Response:
        desk.metrics.cold_start(parts.cold_start.read())
        body, content_type = desk.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return router


def image_origins(settings: GatewaySettings) -> list[str]:
    """Where a browser gets the images from: those made before the bucket was public have signed URLs for ever."""
    public = [_origin(settings.public_base_url)] if settings.public_base_url else []
    if settings.endpoint_url:
        parts = urlsplit(settings.endpoint_url)
        return [
            *public,
            _origin(settings.endpoint_url),
            f"{parts.scheme}://{settings.image_bucket}.{parts.netloc}",
        ]
    return [*public, "https://*.amazonaws.com"]


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _stopped() -> JSONResponse:
    return JSONResponse(
        {"detail": "this server stopped before it could answer: ask again, another may"},
        HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"Retry-After": "1"},
    )


async def _refused(request: Request, refused: Refused) -> JSONResponse:
    request.scope[REASON] = refused.reason
    return JSONResponse({"detail": refused.detail}, refused.status, headers=refused.headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """A query or a path; without what was sent, which nobody needs back."""
    request.scope[REASON] = "input"
    detail = [
        {"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()
    ]
    return JSONResponse({"detail": detail}, HTTPStatus.UNPROCESSABLE_ENTITY)


async def _plain(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


async def _gone(_: Request, __: Exception) -> Response:
    """The caller hung up in the middle of the body: nobody hears this."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    _log.error("unexpected error", exc_info=error)
    return JSONResponse(
        {"detail": "the server made a mistake; its log says which"},
        HTTPStatus.INTERNAL_SERVER_ERROR,
    )
