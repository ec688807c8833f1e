"""What clients of Replicate's hear of a prediction, event by event: each output once, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replicate.stream import EventSource

from gateway.event_stream import Event
from gateway.replicate_stream import Outputs

Heard = list[tuple[str, str]]


def heard(stream: bytes) -> Heard:
    """As Replicate's Python client reads it, which passes over what has no id."""
    decoder = EventSource.Decoder()
    events = [decoder.decode(line) for line in stream.decode().split("\n")]
    return [(event.event.value, event.data) for event in events if event is not None]


def output(index: int) -> Event:
    return Event("output", {"chunk": f"https://images.example/{index}.png", "index": index})


def completed(status: str, count: int = 0, **more: Any) -> Event:
    urls = [f"https://images.example/{index}.png" for index in range(count)]
    return Event("completed", {"status": status, "output": urls, **more})


def told(*events: Event) -> Heard:
    outputs = Outputs()
    return heard(b"".join(outputs.of(event) for event in events))


def urls(count: int) -> Iterator[tuple[str, str]]:
    return (("output", f"https://images.example/{index}.png") for index in range(count))


def test_each_output_is_told_once_though_the_end_has_them_all() -> None:
    events = [Event("start", {}), output(0), output(1), completed("succeeded", 3)]

    assert told(*events) == [*urls(3), ("done", "{}")]


def test_outputs_are_not_told_again_by_a_prediction_that_begins_anew() -> None:
    events = [output(0), Event("start", {}), output(0), output(1), completed("succeeded", 2)]

    assert told(*events) == [*urls(2), ("done", "{}")]


@pytest.mark.parametrize(
    ("end", "names", "reason"),
    [
        (completed("failed", error="no such steps"), ["error", "done"], "error"),
        (completed("canceled"), ["done"], "canceled"),
        # This server stops, and another goes on with it: that is no success.
        (completed("starting"), ["error", "done"], "error"),
    ],
)
def test_an_end_that_is_no_success_says_so(end: Event, names: list[str], reason: str) -> None:
    events = told(end)

    assert [name for name, _ in events] == names
    assert events[-1] == ("done", f'{{"reason": "{reason}"}}')


def test_the_words_of_a_failure_are_told() -> None:
    assert told(completed("failed", error="no such steps"))[0] == (
        "error",
        '{"detail": "no such steps"}',
    )


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r")))
def test_text_comes_through_whatever_is_in_it(text: str) -> None:
    events = told(Event("output", {"chunk": f"a{text}z", "index": 0}))

    assert events == [("output", f"a{text}z")]
