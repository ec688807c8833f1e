"""How sure the gateway's benchmark is of a median: against chance itself, and on the page."""

import random
from statistics import median

import pytest

from benchmarks.door.report import BARE, POST, PUT, median_within, report


@pytest.mark.parametrize(
    ("count", "ranks"), [(6, (1, 6)), (10, (2, 9)), (14, (3, 12)), (200, (86, 115))]
)
def test_bounds_are_the_ranks_of_the_sign_test(count: int, ranks: tuple[int, int]) -> None:
    values = list(range(1, count + 1))
    random.Random(1).shuffle(values)
    assert median_within(values) == ranks


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_say_nothing(count: int) -> None:
    assert median_within([1.0] * count) is None


def test_the_median_lies_within_as_often_as_promised() -> None:
    """Also where the values are anything but normal, as waiting times are."""
    order = random.Random(2)
    within = 0
    for _ in range(2000):
        least, most = median_within([order.expovariate(1.0) for _ in range(25)])
        within += least <= 0.6931 <= most
    assert 0.95 <= within / 2000 <= 0.975  # 0.957 by the binomial


def test_the_page_says_it_of_what_is_compared() -> None:
    order = random.Random(3)
    bare = [0.1 + order.random() / 100 for _ in range(40)]
    alone = {
        BARE: bare,
        PUT: [each + 0.004 for each in bare],
        POST: [each + 0.003 for each in bare],
    }
    rounds = [{"rate": 7.0 + order.random(), "refused": 0, "cpu": 0.005} for _ in range(8)]
    slower = [{**each, "rate": each["rate"] * 0.99} for each in rounds]
    page = report(
        {
            "arguments": "",
            "date": "2026-01-01",
            "machine": "a machine",
            "versions": ["cog 1"],
            "load": 0.0,
            "put_seconds": [0.001],
            "card_seconds": 0.1,
            "callers": 64,
            "slots": 16,
            "parts": {"card": {"alone": alone, "many": {BARE: rounds, PUT: slower}}},
        }
    )
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows[:5]}) == 1
    assert len({line.count("|") for line in rows[5:]}) == 1
    (put, post) = (
        next(line for line in rows if line.startswith(f"| {way} ")) for way in (PUT, POST)
    )
    assert put.endswith("| +4.0 (+4.0 to +4.0) | +4.0 to +4.0 |")
    assert post.endswith("| +3.0 (+3.0 to +3.0) | +3.0 to +3.0 |")
    assert "| 0.990 (0.990 to 0.990) | 0.990 to 0.990 |" in page
    assert f"{median(bare) * 1000:.1f}" in page
