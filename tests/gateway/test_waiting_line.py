"""Slots go to who waited longest; nobody keeps one by giving it up, and the line has an end."""

from __future__ import annotations

import pytest

from gateway.line import Line, LineFullError


def test_slots_are_given_in_the_order_of_coming() -> None:
    line = Line(slots=1, size=2)
    places = [line.join() for _ in range(3)]
    assert [place.turn.is_set() for place in places] == [True, False, False]
    assert (line.running, line.waiting) == (1, 2)

    line.leave(places[0])

    assert [place.turn.is_set() for place in places] == [True, True, False]
    assert (line.running, line.waiting) == (1, 1)


def test_who_gives_up_in_the_middle_is_passed_over() -> None:
    line = Line(slots=1, size=2)
    first, second, third = (line.join() for _ in range(3))
    line.leave(second)
    line.leave(first)
    assert third.turn.is_set()
    line.leave(third)
    assert (line.running, line.waiting) == (0, 0)


@pytest.mark.parametrize("size", [0, 3])
def test_the_line_has_an_end(size: int) -> None:
    line = Line(slots=2, size=size)
    for _ in range(2 + size):
        assert not line.is_full
        line.join()
    assert line.is_full
    with pytest.raises(LineFullError):
        line.join()
    assert line.waiting == size


def test_the_longer_the_line_the_later_it_is_worth_asking_again() -> None:
    short, long = Line(slots=1, size=100), Line(slots=1, size=100)
    for _ in range(20):
        long.join()
    assert 1.0 <= short.advice_s < long.advice_s <= 60.0
