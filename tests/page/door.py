"""A door for the page's tests: the gateway's HTTP interface with states and faults at a test's command.

It stands in for `python -m gateway`, whose model loads, dies and fills its queue when it will. Its schema is the
product's, its images lie on another origin, and what it says is what docs/requests.md describes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gateway.page import page_router
from tests.page.landscapes import encoded, landscape, preview
from tests.support.asgi import HOST, serving

SCHEMA = Path(__file__).resolve().parents[2] / ".cog" / "openapi_schema.json"
STEPS = 4
PATIENCE_S = 30.0
TERMINAL = ("succeeded", "failed", "canceled")
RANDOM_SEED = 5555


@dataclass
class Prediction:
    answer: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    canceled: bool = False

    @property
    def over(self) -> bool:
        return self.answer["status"] in TERMINAL


@dataclass(frozen=True)
class Refusal:
    status: int
    detail: Any
    retry_after: int | None = None


class Door:
    """What a test commands, and what it may ask about. Every attribute may be set while pages look."""

    def __init__(self, *, size: int = 192) -> None:
        self.size = size
        self.key: str | None = None
        self.state = "ready"
        self.reason: str | None = None
        self.cold_start: dict[str, Any] | None = None
        self.waiting = 0
        self.describes = True
        """Whether it knows what the model takes: the gateway does once the model has been loaded."""
        self.refusals: list[Refusal] = []
        """Given to the next predictions that are asked for, one each."""
        self.failure: str | None = None
        self.predictions: dict[str, Prediction] = {}
        self.asked: list[tuple[str, str]] = []
        """Method and path of every request to the interface."""
        self.bodies: list[bytes] = []
        self.signature = 1
        """Images' URLs carry it; URLs with an earlier one are refused."""
        self.cut = 0
        """Raised by one, it breaks off every event stream there is."""
        self.out_of_reach = False
        self._free = threading.Event()
        self._free.set()
        self._steps = threading.Semaphore(0)
        self.address = ""
        self.images = ""

    def hold(self) -> None:
        """Have every further step wait for `let`."""
        self._free.clear()

    def let(self, steps: int = 1) -> None:
        self._steps.release(steps)

    def release(self) -> None:
        self._free.set()
        self._steps.release(1000)

    def earlier(
        self, id: str, prompt: str, *, seed: int = 7, ago_s: float = 0, **input: Any
    ) -> dict[str, Any]:
        """A prediction that was there before anybody looked."""
        answer = _answer(id, {"prompt": prompt, "seed": seed, **input})
        answer["created_at"] = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat()
        prediction = Prediction(answer)
        self.predictions[id] = prediction
        self._succeed(prediction, seed)
        return answer

    def url_of(self, id: str, k: int) -> str:
        return f"{self.images}/{id}-{k}.webp?signature={self.signature}"

    def signed_anew(self, prediction: Prediction) -> dict[str, Any]:
        output = prediction.answer["output"]
        urls = (
            None
            if output is None
            else [self.url_of(prediction.answer["id"], k) for k in range(len(output))]
        )
        return prediction.answer | {"output": urls}

    async def make(self, prediction: Prediction) -> None:
        """Run one prediction as Cog tells of it."""
        answer = prediction.answer
        wanted = answer["input"]
        await self._step()
        answer["status"] = "processing"
        prediction.events.append(("start", {"id": answer["id"], "status": "processing"}))
        first = wanted.get("seed", RANDOM_SEED)
        for image in range(wanted.get("num_outputs", 1)):
            for step in range(1, STEPS + 1):
                await self._step()
                if prediction.canceled:
                    self._complete(prediction, status="canceled")
                    return
                if self.failure:
                    self._complete(prediction, status="failed", error=self.failure)
                    return
                told = {"image": image, "seed": first + image, "step": step, "steps": STEPS}
                if wanted.get("previews"):
                    told["preview"] = self._preview(wanted, first + image, step / STEPS)
                self._metric(prediction, "progress", told)
            url = self.url_of(answer["id"], image)
            self._metric(prediction, "stored", {"image": image, "seed": first + image, "url": url})
        for name in ("progress", "stored"):
            self._metric(prediction, name, None)
        self._succeed(prediction, first)

    def picture(self, input: dict[str, Any], seed: int, size: int | None = None) -> Any:
        across, down = (int(part) for part in input.get("aspect_ratio", "1:1").split(":"))
        scale = (size or self.size) / max(across, down)
        return landscape(seed % 2**32, round(across * scale), round(down * scale))

    def _preview(self, input: dict[str, Any], seed: int, done: float) -> str:
        jpeg = preview(self.picture(input, seed), done)
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

    def _metric(self, prediction: Prediction, name: str, value: Any) -> None:
        prediction.events.append(("metric", {"mode": "replace", "name": name, "value": value}))

    def _succeed(self, prediction: Prediction, seed: int) -> None:
        count = prediction.answer["input"].get("num_outputs", 1)
        urls = [self.url_of(prediction.answer["id"], k) for k in range(count)]
        metrics = {"seed": seed, "model_version": "8ab4e6ad0f8c5b21", "predict_time": 0.412}
        self._complete(prediction, status="succeeded", output=urls, metrics=metrics)

    def _complete(self, prediction: Prediction, **changes: Any) -> None:
        prediction.answer.update(changes, completed_at=datetime.now(UTC).isoformat())
        prediction.events.append(("completed", dict(prediction.answer)))

    async def _step(self) -> None:
        if not self._free.is_set():
            await asyncio.to_thread(self._steps.acquire, True, PATIENCE_S)


def _answer(id: str, input: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    nothing = dict.fromkeys(("output", "error", "started_at", "completed_at"))
    return {
        "id": id,
        "input": input,
        "status": "starting",
        "logs": "",
        "metrics": {},
        "created_at": now,
    } | nothing


def application(door: Door) -> Any:
    app = FastAPI(openapi_url=None)
    app.include_router(page_router([door.images]))
    _tell(app, door)
    _look_up(app, door)
    _make(app, door)

    # Not as FastAPI's middleware, through which a stream that breaks off would look like one that ended.
    async def guard(scope: Any, receive: Any, send: Any) -> None:
        answer: Any = app
        if scope["type"] == "http" and scope["path"].startswith("/predictions"):
            door.asked.append((scope["method"], scope["path"]))
            if door.out_of_reach:
                answer = Response(status_code=502)
            elif door.key and Request(scope).headers.get("Authorization") != f"Bearer {door.key}":
                answer = JSONResponse({"detail": "A key is needed."}, 401)
        await answer(scope, receive, send)

    return guard


def _tell(app: FastAPI, door: Door) -> None:
    @app.get("/openapi.json")
    async def schema() -> Response:
        if not door.describes:
            return JSONResponse({"detail": "The model is not ready."}, 503)
        return Response(SCHEMA.read_bytes(), media_type="application/json")

    @app.get("/status")
    async def status(request: Request) -> dict[str, Any]:
        known = not door.key or request.headers.get("Authorization") == f"Bearer {door.key}"
        queue = {"waiting": door.waiting, "running": 0, "slots": 1, "size": 8}
        now = datetime.now(UTC).isoformat()
        told = {"state": door.state, "since": now, "needs_key": bool(door.key), "queue": queue}
        if known:
            told |= {
                "reason": door.reason,
                "restarts": 0,
                "setup": None,
                "cold_start": door.cold_start,
            }
        return told


def _look_up(app: FastAPI, door: Door) -> None:
    @app.get("/predictions")
    async def recent(limit: int = 20, before: str | None = None) -> dict[str, Any]:
        newest = sorted(
            door.predictions.values(), key=lambda p: p.answer["created_at"], reverse=True
        )
        start = int(before or 0)
        page = [door.signed_anew(prediction) for prediction in newest[start : start + limit]]
        more = start + limit < len(newest)
        return {"predictions": page, "before": str(start + limit) if more else None}

    @app.get("/predictions/{id}")
    async def get(id: str) -> Response:
        if id not in door.predictions:
            return JSONResponse({"detail": "There is no such prediction."}, 404)
        return JSONResponse(door.signed_anew(door.predictions[id]))


def _make(app: FastAPI, door: Door) -> None:
    running: set[asyncio.Task[None]] = set()

    @app.put("/predictions/{id}")
    async def put(id: str, request: Request, accept: str = Header("")) -> Response:
        body = await request.body()
        if door.refusals:
            refusal = door.refusals.pop(0)
            headers = (
                {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
            )
            return JSONResponse({"detail": refusal.detail}, refusal.status, headers)
        if door.state not in ("ready", "busy"):
            return JSONResponse({"detail": "The model is loading."}, 503, {"Retry-After": "2"})
        if id not in door.predictions:
            door.bodies.append(body)
            door.predictions[id] = Prediction(_answer(id, json.loads(body)["input"]))
            task = asyncio.create_task(door.make(door.predictions[id]))
            running.add(task)
            task.add_done_callback(running.discard)
        prediction = door.predictions[id]
        if prediction.over or "text/event-stream" not in accept:
            return JSONResponse(door.signed_anew(prediction), 200 if prediction.over else 202)
        return StreamingResponse(_stream(door, prediction), media_type="text/event-stream")

    @app.post("/predictions/{id}/cancel")
    async def cancel(id: str) -> Response:
        if id not in door.predictions:
            return JSONResponse({"detail": "There is no such prediction."}, 404)
        door.predictions[id].canceled = True
        door.let()
        return JSONResponse({})


async def _stream(door: Door, prediction: Prediction) -> AsyncIterator[str]:
    cut, told = door.cut, 0
    while True:
        if door.cut != cut:
            raise ConnectionResetError("cut, as the test commands")
        while told < len(prediction.events):
            name, data = prediction.events[told]
            told += 1
            yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
        if prediction.over:
            return
        await asyncio.sleep(0.01)


def image_application(door: Door) -> FastAPI:
    """The image bucket, on an origin of its own: presigned URLs that run out."""
    app = FastAPI(openapi_url=None)

    @app.get("/{name}.webp")
    async def image(name: str, signature: int) -> Response:
        made, _, k = name.rpartition("-")
        if signature < door.signature or made not in door.predictions:
            return Response(status_code=403)
        answer = door.predictions[made].answer
        seed = answer["metrics"].get("seed", answer["input"].get("seed", RANDOM_SEED))
        return Response(
            encoded(door.picture(answer["input"], seed + int(k))), media_type="image/webp"
        )

    return app


@contextmanager
def open_door(**options: Any) -> Iterator[Door]:
    door = Door(**options)
    with serving(image_application(door)) as port:
        door.images = f"http://{HOST}:{port}"
        with serving(application(door)) as port:
            door.address = f"http://{HOST}:{port}/"
            try:
                yield door
            finally:
                door.release()
                door.cut += 1
