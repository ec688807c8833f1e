"""A model that logs without end fills no memory here, and those who follow it still hear what matters."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from gateway import prediction as predictions
from gateway.event_stream import Event
from gateway.prediction import KeptEvents, Prediction
from images.prediction import PredictionRecord

START, OUTPUT = Event("start", {}), Event("output", {"chunk": "image", "index": 0})
ROOM = 10  # events


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    size = predictions.EVENT_BYTES + len(log(0).encode())
    monkeypatch.setattr(predictions, "MOST_PASSING_BYTES", ROOM * size)


def log(number: int) -> Event:
    return Event("log", {"data": f"{number:06}"})


def metric(number: int) -> Event:
    return Event("metric", {"name": "step", "value": number})


def prediction() -> Prediction:
    return Prediction(PredictionRecord.of("chatty", {}, created_at=datetime.now(UTC)))


def end(made: Prediction) -> None:
    made.finish("succeeded", output=["image"])
    made.end()


def told(event: Event) -> str:
    return event.data["data"] if event.name == "log" else event.name


async def heard(made: Prediction) -> list[str]:
    return [told(event) async for event in made.events()]


def test_only_the_newest_logs_and_metrics_have_room() -> None:
    events = KeptEvents()
    for number in range(10_000):
        events.add(log(number) if number % 2 else metric(number))

    kept, number = [], 0
    while (found := events.first_from(number)) is not None:
        number = found[0] + 1
        kept.append(found)
    assert [number for number, _ in kept] == list(range(10_000 - len(kept), 10_000))
    size = sum(predictions.EVENT_BYTES + len(event.encode()) for _, event in kept)
    assert 0 < predictions.MOST_PASSING_BYTES - size < 2 * predictions.EVENT_BYTES


def test_one_event_that_is_larger_than_the_room_is_kept_until_the_next() -> None:
    events = KeptEvents()
    huge = Event("log", {"data": "a" * predictions.MOST_PASSING_BYTES})
    events.add(log(0))
    events.add(huge)
    assert events.first_from(0) == (1, huge)
    events.add(log(2))
    assert events.first_from(0) == (2, log(2))


def test_who_comes_late_hears_the_start_the_outputs_the_newest_and_the_end() -> None:
    async def coming_late() -> list[str]:
        made = prediction()
        made.hear(START)
        for number in range(1000):
            made.hear(log(number))
            if number in (500, 994):
                made.hear(OUTPUT)
        end(made)
        return await heard(made)

    newest = [f"{number:06}" for number in range(990, 1000)]
    expected = ["start", "output", *newest[:5], "output", *newest[5:], "completed"]
    assert asyncio.run(coming_late()) == expected


def test_who_reads_along_hears_all_of_it() -> None:
    async def reading_along() -> list[str]:
        made = prediction()
        reading = asyncio.create_task(heard(made))
        made.hear(START)
        for number in range(1000):
            made.hear(log(number))
            if number % ROOM == ROOM - 1:  # as many as come at once
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        made.hear(OUTPUT)
        end(made)
        return await reading

    logs = [f"{number:06}" for number in range(1000)]
    assert asyncio.run(reading_along()) == ["start", *logs, "output", "completed"]


def test_who_reads_too_slowly_misses_logs_and_nothing_else_and_hears_nothing_twice() -> None:
    async def falling_behind() -> list[str]:
        made = prediction()
        events = made.events()
        made.hear(START)
        for number in range(5):
            made.hear(log(number))
        first = [told(await anext(events)) for _ in range(3)]
        made.hear(OUTPUT)
        for number in range(5, 100):
            made.hear(log(number))
        second = [told(await anext(events)) for _ in range(3)]
        for number in range(100, 200):
            made.hear(log(number))
        end(made)
        return [*first, *second, *[told(event) async for event in events]]

    assert asyncio.run(falling_behind()) == [
        *("start", "000000", "000001"),
        *("output", "000090", "000091"),
        *(f"{number:06}" for number in range(190, 200)),
        "completed",
    ]


def test_what_was_told_before_it_began_again_stays_told() -> None:
    async def beginning_again() -> tuple[list[str], str]:
        made = prediction()
        made.hear(START)
        made.hear(log(1))
        made.begin_again()
        made.hear(START)
        made.hear(log(2))
        end(made)
        return await heard(made), made.logs

    events, logs = asyncio.run(beginning_again())
    assert events == ["start", "000001", "start", "000002", "completed"]
    assert logs == "000002"
