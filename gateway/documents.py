"""`/openapi.json`: what Cog's server says of the model, with the gateway's own routes around it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from gateway.cog_client import CogLostError
from gateway.desk import COME_BACK_S, Desk
from gateway.refusals import Refused

# Cog's routes that lead nowhere here: whoever runs the gateway stops it, and the root is a page.
_HIDDEN = ("/shutdown", "/")
# Served by both, and described by Cog's document where the model is.
_COGS_COMPONENTS = ("Input", "Output", "PredictionRequest", "PredictionResponse", "Status")


class Documents:
    """Kept for each life of Cog's server: another life may serve another model."""

    def __init__(self, app: FastAPI, desk: Desk) -> None:
        self._app = app
        self._desk = desk
        self._life = -1
        self._document: dict[str, Any] | None = None

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.get("/openapi.json", include_in_schema=False)
        async def openapi() -> Response:
            return JSONResponse(await self._current())

        return router

    async def _current(self) -> dict[str, Any]:
        life = self._desk.status.restarts
        if self._document is None or (life != self._life and self._desk.status.serving):
            try:
                cogs = await self._desk.client.document() if self._desk.status.serving else None
            except CogLostError:
                cogs = None
            if cogs is None:
                raise Refused(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "the model is not ready, and only then it is known what it takes: GET /ready says when it is",
                    reason="not_serving",
                    retry_after_s=COME_BACK_S,
                )
            self._document, self._life = merged(self._own(), cogs), life
        return self._document

    def _own(self) -> dict[str, Any]:
        return get_openapi(
            title=self._app.title, version="1", routes=self._app.routes, openapi_version="3.1.0"
        )


def merged(own: dict[str, Any], cogs: dict[str, Any]) -> dict[str, Any]:
    """One document: Cog's routes and components, and what the gateway adds. Inputs are described by Cog."""
    paths = {path: item for path, item in (cogs.get("paths") or {}).items() if path not in _HIDDEN}
    for path, item in own["paths"].items():
        # FastAPI writes a path parameter's converter, which OpenAPI does not know.
        plain = path.replace(":path}", "}")
        paths[plain] = {**item, **paths.get(plain, {})}
    components = {
        kind: {**own.get("components", {}).get(kind, {}), **named}
        for kind, named in (cogs.get("components") or {}).items()
    }
    for kind, named in own.get("components", {}).items():
        components[kind] = {**named, **components.get(kind, {})}
    if "securitySchemes" not in components:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": cogs.get("openapi", own["openapi"]),
        "info": cogs.get("info", own["info"]),
        "paths": paths,
        "components": components,
    }
