"""The gate between requests and a new version: many share it, one has it alone, and nobody waits for ever."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest

from diffusion import gate as gate_module
from diffusion.errors import BusyError
from diffusion.gate import Gate

LONG = 60.0


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def holding(gate: Gate) -> Iterator[int]:
    """As the engine's iterators do: inside from the first item on."""
    with gate.shared():
        yield 1
        yield 2


class Alone:
    """A thread that asks for the gate alone, and keeps it until told."""

    def __init__(self, gate: Gate) -> None:
        self.inside, self.leave = Event(), Event()
        self._gate = gate
        self._thread = Thread(target=self._run)

    def _run(self) -> None:
        with self._gate.exclusive(LONG):
            self.inside.set()
            assert self.leave.wait(30)

    def __enter__(self) -> "Alone":
        self._thread.start()
        await_that(lambda: self._gate.closed)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_many_share_it_at_once():
    gate = Gate()

    with gate.shared(), gate.shared():
        assert not gate.closed


def test_whoever_wants_it_alone_waits_until_all_have_left():
    gate = Gate()
    first, second = holding(gate), holding(gate)
    next(first), next(second)

    with Alone(gate) as alone:
        first.close()
        assert not alone.inside.is_set()
        second.close()
        assert alone.inside.wait(30)

    assert not gate.closed


def test_those_who_come_while_it_is_closed_wait_and_then_get_in():
    gate, order = Gate(), []

    def share() -> None:
        with gate.shared():
            order.append("shared")

    with ThreadPoolExecutor(1) as pool:
        with Alone(gate) as alone:
            assert alone.inside.wait(30)
            waiting = pool.submit(share)
            await_that(lambda: gate.waiting == 1)
            order.append("alone")
        waiting.result(30)

    assert order == ["alone", "shared"]


def test_a_stream_of_requests_that_overlap_does_not_keep_it_from_closing():
    gate, stop = Gate(), Event()
    entered: list[int] = []

    def request_after_request() -> None:
        current = holding(gate)
        next(current)
        entered.append(1)
        while not stop.is_set():
            # The next one comes before this one leaves, so that somebody is inside at every moment.
            following = Thread(target=lambda ending=current: ending.close())
            following.start()
            upcoming = holding(gate)
            next(upcoming)
            following.join()
            current = upcoming
            entered.append(1)
        current.close()

    streams = [Thread(target=request_after_request) for _ in range(3)]
    for stream in streams:
        stream.start()
    await_that(lambda: len(entered) > 50)

    try:
        for _ in range(20):
            with gate.exclusive(LONG):
                before = len(entered)
            await_that(lambda before=before: len(entered) > before)
    finally:
        stop.set()
        for stream in streams:
            stream.join(30)


def test_an_iterator_that_is_closed_dropped_or_failed_gives_it_back():
    gate = Gate()
    closed, dropped, failed = (holding(gate) for _ in range(3))
    for iterator in (closed, dropped, failed):
        next(iterator)

    closed.close()
    del dropped, iterator
    with pytest.raises(ValueError, match="broken"):
        failed.throw(ValueError("broken"))

    with gate.exclusive(0.0):
        pass


def test_an_iterator_that_never_began_does_not_hold_it():
    gate = Gate()
    never_asked = holding(gate)

    with gate.exclusive(0.0):
        pass
    assert next(never_asked) == 1


def test_an_iterator_lost_in_a_reference_cycle_is_found(monkeypatch):
    monkeypatch.setattr(gate_module, "COLLECT_EVERY", 0.01)
    gate = Gate()
    iterator = holding(gate)
    next(iterator)
    cycle: list[object] = [iterator]
    cycle.append(cycle)

    gc.disable()  # so that nothing else collects it
    try:
        del iterator, cycle
        with gate.exclusive(LONG):
            pass
    finally:
        gc.enable()


def test_leaving_takes_no_lock_that_the_same_thread_may_hold():
    # Garbage can be collected, and an iterator in it closed, amid anything that a thread does, this included.
    gate = Gate()
    iterator = holding(gate)
    next(iterator)

    with gate._entrance, gate._entrance._guard:
        iterator.close()

    with gate.exclusive(0.0):
        pass


def test_patience_that_ends_lets_the_others_go_on():
    gate = Gate()
    inside = holding(gate)
    next(inside)

    with pytest.raises(BusyError, match=r"1 request\(s\) under way .*try again"), gate.exclusive(0):
        pytest.fail("somebody else was inside")

    assert not gate.closed
    with gate.shared():
        assert list(inside) == [2]
    with gate.exclusive(0.0):
        pass


def test_a_failure_inside_opens_it_again():
    gate = Gate()

    with pytest.raises(ValueError, match="broken"), gate.exclusive(LONG):
        raise ValueError("broken")

    with gate.shared():
        assert not gate.closed


def test_only_one_at_a_time_has_it_alone():
    gate = Gate()

    with ThreadPoolExecutor(1) as pool:
        with Alone(gate) as alone:
            assert alone.inside.wait(30)
            second = pool.submit(lambda: gate.exclusive(LONG).__enter__())
            await_that(lambda: gate.waiting == 1)
            assert not second.done()
        second.result(30)


def test_what_has_left_is_not_remembered_for_ever():
    gate = Gate()

    for _ in range(100):
        with gate.shared():
            pass

    assert gate._left.qsize() <= 1
