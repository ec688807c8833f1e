"""What state the server is in, for people, platforms and the page."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gateway.callers import Callers
from gateway.cog_health import Setup
from gateway.cog_status import State
from gateway.desk import COME_BACK_S, Desk

COLD_START = "cold-start.json"
# What Cog's own health check calls a state that has another name here.
COGS_NAMES = {
    State.DEAD: "UNHEALTHY",
    State.STOPPING: "DEFUNCT",
    State.STOPPED: "DEFUNCT",
}


class ColdStartFile:
    """The timeline of the start that the Runner leaves; read again when it has changed."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder and folder / COLD_START
        self._seen: tuple[int, int] | None = None
        self._content: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """None where there is none, or none that can be read."""
        if self._path is None:
            return None
        try:
            told = self._path.stat()
            seen = told.st_mtime_ns, told.st_size
            if seen != self._seen:
                content = json.loads(self._path.read_bytes())
                self._content = content if isinstance(content, dict) else None
                self._seen = seen
        except (OSError, ValueError):
            return None
        return self._content


def state_router(
    desk: Desk, callers: Callers, cold_start: ColdStartFile, model_path: str
) -> APIRouter:
    """`/live`, `/ready`, `/health-check` and `/status`: no key is needed, and nothing secret is told without one."""
    router = APIRouter()

    @router.get("/live", summary="200 as long as the gateway answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get(
        "/ready",
        summary="200 when a prediction would be made, else 503",
        responses={
            HTTPStatus.SERVICE_UNAVAILABLE.value: {"description": "Not now, and why"},
        },
    )
    async def ready() -> Response:
        if desk.open:
            return JSONResponse({"status": "ready"})
        state = "stopping" if desk.draining else desk.status.state.value
        return JSONResponse(
            {"status": state},
            HTTPStatus.SERVICE_UNAVAILABLE,
            headers={"Retry-After": str(int(COME_BACK_S))},
        )

    @router.get("/health-check", summary="Cog's health check: 200, and the state in the body")
    async def health_check(request: Request) -> dict[str, Any]:
        now = desk.status
        told: dict[str, Any] = {"status": COGS_NAMES.get(now.state, now.state.name)}
        if now.setup is not None:
            told["setup"] = _times(now.setup) | {
                "status": "failed" if now.setup.error else "succeeded"
            }
            if callers.may_see(request):
                told["setup"]["logs"] = now.setup.logs
        return told

    @router.get("/status", summary="All that there is to know; reasons only for who may come in")
    async def status(request: Request) -> dict[str, Any]:
        now = desk.status
        told: dict[str, Any] = {
            "state": "stopping" if desk.draining else now.state.value,
            "since": now.since.isoformat(),
            "needs_key": callers.need_key,
            "queue": {
                "waiting": desk.waiting,
                "running": desk.running,
                "slots": desk.slots,
                "size": desk.queue_size,
            },
        }
        if callers.may_see(request):
            told |= {
                "reason": now.reason,
                "restarts": now.restarts,
                "setup": now.setup and _times(now.setup) | {"error": now.setup.error},
                "cold_start": cold_start.read(),
                "model": {"path": model_path},
            }
        return told

    return router


def _times(setup: Setup) -> dict[str, Any]:
    return {
        "started_at": setup.started_at and setup.started_at.isoformat(),
        "completed_at": setup.completed_at and setup.completed_at.isoformat(),
    }
