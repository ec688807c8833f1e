"""What Replicate's HTTP API says, and how: its predictions, models, versions and errors, made of what this server has.

It asks nobody and has no routes (replicate.py and replicate_models.py do).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from gateway.refusals import REASON, Refused, wrong_input
from gateway.state import ColdStartFile

PROBLEM_TYPE = "application/problem+json"
# What Replicate calls a version that it does not tell.
UNTOLD_VERSION = "hidden"
_TITLES = {
    HTTPStatus.UNAUTHORIZED: "Unauthenticated",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Input validation failed",
    HTTPStatus.TOO_MANY_REQUESTS: "Request was throttled.",
}
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


@dataclass(frozen=True)
class Models:
    """The models that this server has, by their MODEL_PATH; requests that name none get the first."""

    paths: tuple[str, ...]
    cold_start: ColdStartFile

    def version(self, path: str) -> str | None:
        """The version that the server started with. Of the first alone: nothing tells it of the others."""
        told = (self.cold_start.read() or {}).get("version")
        return str(told) if told and path == self.paths[0] else None

    def named(self, reference: str | None) -> str:
        """The model that `owner/name`, `owner/name:version` or a version means. Raises Refused (422)."""
        if reference is None:
            return self.paths[0]
        path, colon, version = reference.partition(":")
        if not colon and path in self.paths:
            return path
        if colon and path in self.paths and version == self.version(path):
            return path
        if not colon and reference == self.version(self.paths[0]):
            return self.paths[0]
        raise Refused(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"{reference[:200]} is no model or version of this server, which has {self._choices()}",
            reason="input",
        )

    def found(self, owner: str, name: str) -> str:
        """Raises Refused (404)."""
        path = f"{owner}/{name}"
        if path in self.paths:
            return path
        raise Refused(
            HTTPStatus.NOT_FOUND,
            f"this server does not have that model: it has {self._choices()}",
            reason="unknown",
        )

    def input_for(self, path: str, given: dict[str, Any]) -> dict[str, Any]:
        """The input of a prediction by that model: it has to be named where there are several."""
        return {**given, "model": path} if len(self.paths) > 1 else given

    def addressable(self) -> list[list[str]]:
        """Owner and name of those that Replicate's URLs can name; others are named in bodies."""
        parts = [path.split("/") for path in self.paths]
        return [owner_and_name for owner_and_name in parts if len(owner_and_name) == 2]

    def _choices(self) -> str:
        known = [
            f"{path} (version {version})" if (version := self.version(path)) else path
            for path in self.paths
        ]
        return ", ".join(known)


def base_url(request: Request) -> str:
    """How the caller reaches this server, without a slash at the end.

    What a proxy says of that is taken from anybody, as `Host` is: the URLs made of it go back to the same caller.
    """
    scheme = _first(request, "x-forwarded-proto") or request.scope["scheme"]
    host = _first(request, "x-forwarded-host") or request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = "{}:{}".format(*(request.scope.get("server") or ("localhost", 80)))
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def _first(request: Request, header: str) -> str:
    """Each proxy on the way adds to its end, so the first is what the caller spoke to."""
    return request.headers.get(header, "").partition(",")[0].strip()


def prediction(answer: dict[str, Any], base: str, models: Models, seal: str) -> dict[str, Any]:
    """A prediction as Replicate tells it, made of Cog's answer. `seal` lets whoever has its URL follow the stream."""
    model = str(answer["input"].get("model") or models.paths[0])
    metrics = dict(answer.get("metrics") or {})
    total = _seconds(answer.get("created_at"), answer.get("completed_at"))
    if total is not None:
        metrics["total_time"] = total
    url = f"{base}/v1/predictions/{quote(answer['id'], safe='')}"
    return {
        "id": answer["id"],
        "model": model,
        "version": metrics.get("model_version") or models.version(model) or UNTOLD_VERSION,
        "input": answer["input"],
        "output": answer.get("output"),
        "error": answer.get("error"),
        "logs": answer.get("logs", ""),
        "metrics": metrics,
        "status": answer["status"],
        "created_at": answer.get("created_at"),
        "started_at": answer.get("started_at"),
        "completed_at": answer.get("completed_at"),
        "data_removed": False,
        "source": "api",
        "urls": {
            "get": url,
            "cancel": f"{url}/cancel",
            "stream": f"{url}/stream" + (f"?seal={seal}" if seal else ""),
        },
    }


def model(path: str, base: str, latest: dict[str, Any] | None) -> dict[str, Any]:
    """What Replicate's clients insist on is there, empty where this server knows nothing of it."""
    owner, _, name = path.partition("/")
    return {
        "url": f"{base}/v1/models/{path}",
        "owner": owner,
        "name": name,
        "description": None,
        "visibility": "private",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": latest,
    }


def version(name: str, created_at: datetime, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "created_at": created_at.isoformat(),
        "cog_version": str((schema.get("info") or {}).get("version", "")),
        "openapi_schema": schema,
    }


def page(results: list[dict[str, Any]], next_url: str | None = None) -> dict[str, Any]:
    """A page of a list. None leads back: the bucket lists in one direction."""
    return {"previous": None, "next": next_url, "results": results}


def problem_answer(refused: Refused) -> JSONResponse:
    """An error in the form that Replicate's clients read (RFC 9457), with the fields of the input that are wrong."""
    body: dict[str, Any] = {
        "title": _TITLES.get(refused.status, refused.status.phrase),
        "status": refused.status.value,
    }
    if isinstance(refused.detail, str):
        body["detail"] = refused.detail
    else:
        fields = [
            {
                "type": wrong["type"],
                "field": ".".join(str(part) for part in wrong["loc"] if part != "body"),
                "description": wrong["msg"],
            }
            for wrong in refused.detail
        ]
        body["detail"] = "\n".join(f"- {one['field']}: {one['description']}" for one in fields)
        body["invalid_fields"] = fields
    return JSONResponse(body, refused.status, refused.headers, media_type=PROBLEM_TYPE)


def _seconds(began: str | None, ended: str | None) -> float | None:
    if began is None or ended is None:
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


class ReplicateRoute(APIRoute):
    """A route whose errors are told as Replicate tells them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except Refused as error:
                refused = error
            except RequestValidationError as error:
                refused = wrong_input(
                    [
                        {"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]}
                        for one in error.errors()
                    ]
                )
            request.scope[REASON] = refused.reason
            return problem_answer(refused)

        return handle_or_refuse
