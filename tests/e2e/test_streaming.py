"""Watching a prediction: Cog's event stream through the real server, and those who ask for none of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from PIL import Image

from demo.s3 import Fault
from demo.small_sdxl import write_small_sdxl
from tests.e2e.conftest import deploy, fetch, image_urls
from tests.support.cog_server import CogServer
from tests.support.event_stream import Event, EventStream

# 200 steps with guidance: far from done when its caller has seen the first.
LONG = {"prompt": "a fox", "num_inference_steps": 50, "num_outputs": 4}


@pytest.fixture(scope="module")
def slow_server(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """One that serves a model of any number of steps, to one caller at a time."""
    folder = tmp_path_factory.mktemp("guided") / "model"
    deployment = deploy(s3, write_small_sdxl(folder, lightning=False))
    with CogServer(deployment.environment(), concurrency=1) as running:
        yield running


def watched(server: CogServer, **input: object) -> list[Event]:
    with EventStream(server, {"prompt": "a fox", **input}) as events:
        assert events.response.status == 200, events.response.read()
        assert events.response.headers["Content-Type"] == "text/event-stream"
        return list(events)


def recorded(events: Sequence[Event], name: str) -> list[Any]:
    """What was recorded under that name, without the null that takes it back."""
    metrics = [event.data for event in events if event.name == "metric"]
    values = [metric["value"] for metric in metrics if metric["name"] == name]
    assert values.pop() is None
    return values


def test_there_is_one_event_for_each_step_in_order_before_the_output(server):
    events = watched(server, seed=41, num_outputs=2)

    assert events[0].name == "start"
    progress = recorded(events, "progress")
    for image in range(2):
        mine = [step for step in progress if step["image"] == image]
        assert mine == [
            {"image": image, "seed": 41 + image, "step": step, "steps": 4} for step in range(1, 5)
        ]
    assert len(progress) == 8
    names = [event.name for event in events]
    last_step = max(
        place
        for place, event in enumerate(events)
        if event.data.get("name") == "progress" and event.data["value"]
    )
    assert last_step < names.index("output")
    assert events[-1].name == "completed"
    assert events[-1].data["status"] == "succeeded"


def test_the_stream_ends_with_the_urls_in_order_and_each_is_told_of_when_it_is_stored(server):
    events = watched(server, seed=41, num_outputs=2)

    outputs = [event.data for event in events if event.name == "output"]
    urls = [output["chunk"] for output in outputs]
    assert [output["index"] for output in outputs] == [0, 1]
    assert events[-1].data["output"] == urls
    assert recorded(events, "stored") == [
        {"image": image, "seed": 41 + image, "url": url} for image, url in enumerate(urls)
    ]
    assert all(Image.open(io.BytesIO(fetch(url))).format == "PNG" for url in urls)


def test_previews_are_pictures_that_open(server):
    events = watched(server, previews=True, aspect_ratio="3:2")

    previews = [progress["preview"] for progress in recorded(events, "progress")]
    assert len(previews) == 4
    for preview in previews:
        kind, _, data = preview.partition(",")
        assert kind == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        picture.load()
        assert picture.width > picture.height
        assert picture.width <= 256


def test_a_finished_prediction_looks_the_same_whether_it_was_watched_or_not(server):
    plain = server.predict({"prompt": "a fox", "seed": 5}).body
    watched_one = watched(server, seed=5, previews=True)[-1].data

    assert plain.keys() == watched_one.keys()
    assert plain["metrics"].keys() == watched_one["metrics"].keys()
    assert plain["metrics"].keys() == {"predict_time", "seed", "model_version", "timings"}
    assert fetch(plain["output"][0]) == fetch(watched_one["output"][0])


def test_a_prediction_that_fails_says_so_in_the_stream(server):
    (start, end) = watched(server, num_inference_steps=3)

    assert start.name == "start"
    assert end.name == "completed"
    assert end.data["status"] == "failed"
    assert "num_inference_steps is 3" in end.data["error"]


def test_an_image_is_told_of_while_the_next_one_is_not_stored_yet(server, deployment):
    slow = Fault(kind="hold", method="PUT", bucket=deployment.images, key="*-1.png")

    with EventStream(server, {"prompt": "a fox", "num_outputs": 2}) as events:
        with deployment.s3.fault(slow):
            told = next(event.data for event in events if event.data.get("name") == "stored")
            assert Image.open(io.BytesIO(fetch(told["value"]["url"]))).format == "PNG"
            assert told["value"]["image"] == 0
        assert [event.name for event in events][-1] == "completed"


def test_a_failed_prediction_s_metrics_are_as_empty_as_ever(server, deployment):
    refused = Fault(
        kind="status", method="PUT", bucket=deployment.images, key="*-1.png", status=403
    )

    with deployment.s3.fault(refused):
        events = watched(server, num_outputs=2)

    (stored,) = recorded(events, "stored")
    end = events[-1].data
    assert end["status"] == "failed"
    assert stored["url"] in end["error"]
    assert end["metrics"].keys() == {"predict_time"}
    assert "output" not in [event.name for event in events]


def test_a_caller_who_stops_reading_cancels_and_the_next_one_is_served(slow_server):
    with EventStream(slow_server, LONG) as events:
        next(event for event in events if event.data.get("name") == "progress")

    slow_server.wait_for_log("Cancelled: seed")
    image_urls(slow_server.predict({"prompt": "a hare", "num_inference_steps": 2}))
