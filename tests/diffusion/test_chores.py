"""What the device's thread does beside requests: when nobody asks for anything, or as soon as it can."""

import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest

from diffusion.engine import Engine, GenerationRequest
from tests.diffusion.support import LIGHTNING, build

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=2, seed=3)


@pytest.fixture
def engine(model) -> Engine:
    return Engine(build(model), LIGHTNING, batch_size=2)


def under_load(engine: Engine, enough: threading.Event) -> threading.Thread:
    """So many callers that the device never waits, until it was enough."""

    def ask(number: int) -> None:
        while not enough.is_set():
            list(engine.generate(replace(REQUEST, seed=number)))

    def ask_all() -> None:
        callers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    thread = threading.Thread(target=ask_all)
    thread.start()
    return thread


def test_what_is_short_has_its_turn_also_when_requests_never_end(engine):
    list(engine.generate(REQUEST))
    enough, done = threading.Event(), []
    callers = under_load(engine, enough)
    try:
        for number in range(3):
            engine._loop.soon(lambda number=number: done.append(number)).result(60)
    finally:
        enough.set()
        callers.join(60)

    assert done == [0, 1, 2]


def test_requests_are_served_after_it_also_when_it_fails(engine):
    def fail() -> None:
        raise ValueError("not today")

    failed = engine._loop.soon(fail)

    assert len(list(engine.generate(REQUEST))) == 1
    assert str(failed.exception(60)) == "ValueError: not today"


def test_a_thread_that_has_ended_does_nothing_more(engine):
    list(engine.generate(REQUEST))
    engine._loop.stop()

    for ask in (engine._loop.soon, engine._loop.when_idle):
        with pytest.raises(CancelledError):
            ask(lambda: None).result(10)
