"""The part of Replicate's HTTP API that says which models there are, and whose key was sent."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import JSONResponse

from gateway import replicate_form as form
from gateway.callers import Callers
from gateway.desk import Desk
from gateway.documents import Documents
from gateway.keys import KeyName
from gateway.refusals import Refused
from gateway.schemas import answered


def replicate_models_router(
    desk: Desk, callers: Callers, models: form.Models, documents: Documents
) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1", route_class=form.ReplicateRoute, tags=["replicate"])
    owners = Path(examples=[owner for owner, _ in models.addressable()])
    names = Path(examples=[name for _, name in models.addressable()])
    enter = Depends(callers.enter)

    async def versions_of(path: str) -> list[dict[str, Any]]:
        name = models.version(path)
        if name is None:
            return []
        setup = desk.status.setup
        ready_at = (setup and setup.completed_at) or desk.status.since
        return [form.version(name, ready_at, await documents.cogs())]

    @router.get(
        "/models/{owner}/{name}",
        summary="A model of this server",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicateModel"),
    )
    async def model(
        request: Request, owner: Annotated[str, owners], name: Annotated[str, names]
    ) -> Response:
        path = models.found(owner, name)
        versions = await versions_of(path)
        latest = versions[0] if versions else None
        return JSONResponse(form.model(path, form.base_url(request), latest))

    @router.get(
        "/models/{owner}/{name}/versions",
        summary="The version of a model that this server started with",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicateVersions"),
    )
    async def versions(owner: Annotated[str, owners], name: Annotated[str, names]) -> Response:
        return JSONResponse(form.page(await versions_of(models.found(owner, name))))

    @router.get(
        "/models/{owner}/{name}/versions/{version_id}",
        summary="A version, with the inputs it takes",
        dependencies=[enter],
        responses=answered(HTTPStatus.OK, "ReplicateVersion"),
    )
    async def version(
        owner: Annotated[str, owners], name: Annotated[str, names], version_id: str
    ) -> Response:
        for one in await versions_of(models.found(owner, name)):
            if one["id"] == version_id:
                return JSONResponse(one)
        raise Refused(HTTPStatus.NOT_FOUND, "this server has no such version", reason="unknown")

    @router.get(
        "/account",
        summary="Whose key this is",
        responses=answered(HTTPStatus.OK, "ReplicateAccount"),
    )
    async def account(caller: Annotated[KeyName | None, enter]) -> Response:
        name = caller or "anonymous"
        return JSONResponse({"type": "user", "username": name, "name": name, "github_url": None})

    return router
