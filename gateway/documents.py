"""`/openapi.json`: what Cog's server says of the model, with the gateway's own routes around it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from gateway.callers import Callers
from gateway.cog_client import CogLostError
from gateway.desk import COME_BACK_S, Desk
from gateway.refusals import Refused
from gateway.schemas import SCHEMAS, ref

# What FastAPI writes. Cog's is 3.0.2.
OPENAPI = "3.1.0"
# Cog's routes that lead nowhere here: whoever runs the gateway stops it, and the root is a page.
_HIDDEN = ("/shutdown", "/")


class Documents:
    """Kept for each life of Cog's server: another life may serve another model."""

    def __init__(self, app: FastAPI, desk: Desk, callers: Callers) -> None:
        self._app = app
        self._desk = desk
        self._callers = callers
        self._life = -1
        self._cogs: dict[str, Any] | None = None
        self._document: dict[str, Any] | None = None

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.get("/openapi.json", include_in_schema=False)
        async def openapi() -> Response:
            cogs = await self.cogs()
            if self._document is None:
                self._document = self._whole(cogs)
            return JSONResponse(self._document)

        return router

    async def cogs(self) -> dict[str, Any]:
        """What Cog's server says. Raises Refused (503) before it has said anything."""
        status = self._desk.status
        if self._cogs is None or (status.restarts != self._life and status.serving):
            try:
                cogs = await self._desk.client.document() if status.serving else None
            except CogLostError:
                cogs = None
            if cogs is None:
                raise Refused(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "the model is not ready, and only then it is known what it takes: GET /ready says when it is",
                    reason="not_serving",
                    retry_after_s=COME_BACK_S,
                )
            self._cogs, self._life, self._document = cogs, status.restarts, None
        return self._cogs

    def _whole(self, cogs: dict[str, Any]) -> dict[str, Any]:
        own = get_openapi(
            title=self._app.title, version="1", routes=self._app.routes, openapi_version=OPENAPI
        )
        whole = merged(own, cogs)
        for path, item in whole["paths"].items():
            for operation in item.values():
                self._complete(path, operation)
        return whole

    def _complete(self, path: str, operation: dict[str, Any]) -> None:
        """What holds for all operations: their errors, and who may ask for them."""
        error = (
            ("application/problem+json", "ReplicateProblem")
            if path.startswith("/v1/")
            else ("application/json", "Error")
        )
        content = {error[0]: {"schema": ref(error[1])}}
        answers = operation["responses"]
        answers.pop("422", None)  # FastAPI's own, which is but one of these
        answers["4XX"] = {"description": "It is refused, and why", "content": content}
        for status in HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE:
            answers.setdefault(
                str(status.value), {"description": status.phrase, "content": content}
            )
        if not self._callers.need_key:
            operation.pop("security", None)


def merged(own: dict[str, Any], cogs: dict[str, Any]) -> dict[str, Any]:
    """One document: Cog's routes and components, and what the gateway adds. Inputs are described by Cog."""
    paths = {path: item for path, item in (cogs.get("paths") or {}).items() if path not in _HIDDEN}
    for path, item in own["paths"].items():
        theirs = paths.get(_plain(path), {})
        paths[_plain(path)] = {**theirs, **item} | {
            method: _both(item[method], theirs[method]) for method in item.keys() & theirs.keys()
        }
    schemas = (cogs.get("components") or {}).get("schemas") or {}
    return {
        "openapi": OPENAPI,
        "info": cogs.get("info", own["info"]),
        "paths": paths,
        "components": {
            # A model without a schema takes anything.
            "schemas": {"Input": {"type": "object"}, "PredictionResponse": {"type": "object"}}
            | own.get("components", {}).get("schemas", {})
            | {name: _in_31(schema) for name, schema in schemas.items()}
            | SCHEMAS,
            "securitySchemes": own.get("components", {}).get("securitySchemes", {}),
        },
    }


def _both(own: dict[str, Any], cogs: dict[str, Any]) -> dict[str, Any]:
    """An operation that both describe: Cog's name and extensions, and the gateway's bodies."""
    return own | {
        name: told for name, told in cogs.items() if name not in ("requestBody", "responses")
    }


def _in_31(schema: Any) -> Any:
    """Without what would say that an input may be null: Cog's server refuses that, and knows no `nullable`."""
    if isinstance(schema, list):
        return [_in_31(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _in_31(inner)
        for name, inner in schema.items()
        if name != "nullable" and not (name == "default" and inner is None)
    }


def _plain(path: str) -> str:
    """FastAPI writes a path parameter's converter, which OpenAPI does not know."""
    return path.replace(":path}", "}")
