"""The pace finds how many connections pay, gives back those that do not, and yields when the server asks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from weights.pace import (
    FAST,
    FIRST,
    FIRST_STEP,
    LIMIT,
    LOOKS,
    PLAINLY_SLOW,
    RESPITE,
    SETTLED_AT_MOST,
    SETTLED_FOR,
    STEP,
    Pace,
)

INTERVAL = 0.1  # seconds between two looks
ONE = 50e6  # bytes per second over one connection

Wire = Callable[[int], float]


def wire(connections_that_pay: int) -> Wire:
    """A wire whose rate grows with every connection up to so many, and stays there."""
    return lambda connections: ONE * min(connections, connections_that_pay)


def drive(pace: Pace, rate_of: Wire, seconds: float, start: float = 0.0) -> list[int]:
    """Let the pace watch a wire; its targets after every interval."""
    targets = []
    for step in range(round(seconds / INTERVAL)):
        pace.observe(rate_of(pace.target), start + step * INTERVAL)
        targets.append(pace.target)
    return targets


def test_it_begins_with_a_few_connections():
    assert Pace().target == FIRST
    assert Pace(first=6).target == 6
    assert Pace(limit=3, first=6).target == 3


def test_it_doubles_while_that_pays_up_to_the_limit():
    steps = list(dict.fromkeys(drive(Pace(), wire(10 * LIMIT), seconds=10)))
    assert steps[0] == FIRST
    assert steps[-1] == LIMIT
    factors = [FIRST_STEP, *[STEP] * len(steps)]
    for before, after, factor in zip(steps, steps[1:], factors, strict=False):
        assert after == min(factor * before, LIMIT)


def test_it_never_exceeds_its_own_limit():
    assert max(drive(Pace(limit=12), wire(1000), seconds=30)) == 12


def test_a_step_that_brings_nothing_is_taken_back():
    pace = Pace()
    targets = drive(pace, wire(FIRST), seconds=0.8)
    assert max(targets) == FIRST_STEP * FIRST
    assert pace.target == FIRST


@pytest.mark.parametrize("pays", [16, 20, 32, 40])
def test_it_settles_where_more_connections_stop_paying(pays):
    pace = Pace()
    targets = drive(pace, wire(pays), seconds=60)
    # A look beyond now and then is all that it allows itself.
    assert {target for target in targets if targets.count(target) > len(targets) / 2} == {
        FIRST_STEP * FIRST if pays <= FIRST_STEP * FIRST else STEP * FIRST_STEP * FIRST
    }


def test_it_waits_before_it_tries_again_and_then_finds_what_has_become_worth_it():
    pace = Pace()
    targets = drive(pace, wire(FIRST), seconds=0.8)
    tried_at = targets.index(FIRST_STEP * FIRST)
    taken_back_at = tried_at + LOOKS + 1  # an interval to open them, and those in which it looks
    assert set(targets[tried_at:taken_back_at]) == {FIRST_STEP * FIRST}
    assert set(targets[taken_back_at:]) == {FIRST}

    later = drive(pace, wire(LIMIT), seconds=10, start=0.8)
    assert later[-1] == LIMIT


def test_each_further_try_in_vain_comes_later_than_the_one_before():
    targets = drive(Pace(), wire(FIRST), seconds=60)
    tries = [index for index, (before, after) in enumerate(pairwise(targets)) if after > before]
    pauses = [after - before for before, after in pairwise(tries)]
    assert all(after >= before - 1 for before, after in pairwise(pauses))  # an interval's rounding
    assert pauses[-1] > 8 * pauses[0]
    assert pauses[0] * INTERVAL < 3 * SETTLED_FOR
    assert SETTLED_AT_MOST <= pauses[-1] * INTERVAL < 1.5 * SETTLED_AT_MOST


def test_one_interval_of_good_or_bad_luck_decides_nothing():
    pace = Pace()
    for number, luck in enumerate([1.0, 1.3]):  # a burst while it takes its first look
        pace.observe(ONE * FIRST * luck, number * INTERVAL)
    assert pace.target == FIRST_STEP * FIRST
    for number, luck in enumerate([0.1, 0.2, 0.8], start=2):  # and a hiccup at the next
        pace.observe(ONE * FIRST_STEP * FIRST * luck, number * INTERVAL)
    assert pace.target == STEP * FIRST_STEP * FIRST


def test_the_interval_in_which_connections_are_still_opening_decides_nothing():
    pace = Pace()
    pace.observe(0.0, 0.0)
    assert pace.target == FIRST
    pace.observe(ONE * FIRST, INTERVAL)
    assert pace.target == FIRST_STEP * FIRST

    pace.observe(0.0, 2 * INTERVAL)  # the new ones are on their way

    assert pace.target == FIRST_STEP * FIRST


def test_a_wire_that_is_not_plainly_slow_gets_a_second_look():
    pace = Pace(cores=FIRST)
    for number, luck in enumerate([1.0, 0.6, 1.4]):  # a hiccup at the first
        pace.observe(PLAINLY_SLOW * FIRST * 1.9 * luck, number * INTERVAL)
        if number == 1:
            assert pace.target == FIRST
    assert pace.target == FIRST_STEP * FIRST


def test_where_every_core_has_a_fast_connection_no_more_are_tried():
    for cores, tried in ((FIRST, False), (FIRST + 1, True)):
        pace = Pace(cores=cores)
        targets = drive(pace, lambda connections: FAST * connections, seconds=2)
        assert (max(targets) > FIRST) == tried
    pace = Pace(cores=FIRST)
    drive(pace, lambda connections: 0.9 * FAST * connections, seconds=2)
    assert pace.target > FIRST


def test_a_server_that_asks_for_patience_gets_half_the_connections():
    pace = Pace()
    drive(pace, wire(1000), seconds=3)
    assert pace.target == LIMIT
    pace.throttled(3.0)
    assert pace.target == LIMIT // 2


def test_many_answers_that_ask_for_patience_at_once_halve_once():
    pace = Pace()
    for moment in (0.0, 0.1, 0.2, 0.3):
        pace.throttled(moment)
    assert pace.target == FIRST // 2


def test_a_server_that_goes_on_asking_gets_less_and_less_and_never_nothing():
    pace = Pace()
    targets = [pace.target]
    for step in range(10):
        pace.throttled(step * RESPITE)
        targets.append(pace.target)
    assert all(after == max(1, before // 2) for before, after in pairwise(targets))
    assert targets[-1] == 1


def test_a_server_that_asks_without_pause_gets_less_and_less():
    pace = Pace(first=LIMIT)
    for step in range(round(4 * RESPITE / INTERVAL)):
        pace.throttled(step * INTERVAL)
    assert pace.target < LIMIT // 2


def test_after_a_respite_it_grows_again():
    pace = Pace()
    pace.throttled(0.0)

    assert set(drive(pace, wire(1000), seconds=RESPITE)) == {FIRST // 2}
    assert drive(pace, wire(1000), seconds=10, start=RESPITE)[-1] == LIMIT


def test_a_pinned_number_stays_whatever_happens():
    pace = Pace(5)
    assert set(drive(pace, wire(1000), seconds=10)) == {5}
    pace.throttled(10.0)
    assert set(drive(pace, wire(1), seconds=10, start=10.0)) == {5}


def test_a_pinned_number_stays_within_the_limit():
    assert Pace(100, limit=12).target == 12
