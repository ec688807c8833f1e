"""Events are read from a stream however it is cut, and written so that they can be read."""

from __future__ import annotations

import pytest

from gateway.event_stream import Event, EventReader, asks_for_events

EVENTS = [
    Event("start", {"id": "a"}),
    Event("log", {"data": "grüße\nund mehr", "source": "stdout"}),
    Event("completed", {"status": "succeeded", "output": ["https://images.example/a.png"]}),
]


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_events_are_read_however_the_stream_is_cut(length: int) -> None:
    stream = b": a comment\n\n" + b"".join(event.encode() for event in EVENTS)
    reader = EventReader()

    read = [
        event
        for start in range(0, len(stream), length)
        for event in reader.feed(stream[start : start + length])
    ]

    assert read == EVENTS


def test_what_the_standard_allows_beside_what_cog_sends_is_read_too() -> None:
    stream = b'id: 7\r\nevent:log\r\ndata: {"data":\r\ndata: "x"}\r\nretry: 5\r\n\r\n'

    assert list(EventReader().feed(stream)) == [Event("log", {"data": "x"})]


@pytest.mark.parametrize("data", [b"[1]", b"nothing", b"\xff"])
def test_what_is_none_of_cogs_events_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"holds no object|Expecting value|utf-8"):
        list(EventReader().feed(b"event: log\ndata: " + data + b"\n\n"))


def test_who_asks_for_events_says_so() -> None:
    assert asks_for_events("application/json, Text/Event-Stream;q=0.9")
    assert not asks_for_events("application/json")
    assert not asks_for_events(None)
