"""The queue for the device: one at a time, in the order of asking."""

import time
from concurrent.futures import ThreadPoolExecutor

from diffusion.turns import Turns


def await_queue(turns: Turns, length: int) -> None:
    deadline = time.monotonic() + 30
    while turns.waiting != length:
        assert time.monotonic() < deadline, f"{turns.waiting} waiting, expected {length}"


def test_turns_are_taken_in_the_order_of_asking():
    turns, order = Turns(), []

    def take(name: int) -> None:
        with turns:
            order.append(name)

    with ThreadPoolExecutor(5) as pool, turns:
        for name in range(5):
            pool.submit(take, name)
            await_queue(turns, name + 1)
        assert order == []

    assert order == [0, 1, 2, 3, 4]


def test_whoever_asks_again_at_once_waits_behind_those_already_waiting():
    turns, order = Turns(), []

    def other() -> None:
        with turns:
            order.append("other")

    with ThreadPoolExecutor(1) as pool:
        with turns:
            pool.submit(other)
            await_queue(turns, 1)
            order.append("first")
        with turns:
            order.append("again")

    assert order == ["first", "other", "again"]


def test_a_turn_that_fails_is_handed_on():
    turns = Turns()

    try:
        with turns:
            raise ValueError
    except ValueError:
        pass

    with turns:
        assert turns.waiting == 0
