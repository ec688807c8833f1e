"""Bytes and seconds in words."""

from __future__ import annotations

import pytest

from preparation.amounts import clock, human_size, human_time, outcome, part_of, standing


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1500, "1.5 kB"),
        (5_135_149_760, "5.14 GB"),
        (167_335_342, "167 MB"),
        (999_499_999, "999 MB"),
        (999_600_000, "1 GB"),
        (1_300_000_000_000, "1.3 TB"),
    ],
)
def test_sizes_read_as_on_the_hub(size: float, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 6_940_000_000, "0.00 of 6.94 GB"),
        (50_000_000, 6_940_000_000, "0.05 of 6.94 GB"),
        (1_000_000, 167_335_342, "1 of 167 MB"),
        (7, 10, "7 of 10 B"),
    ],
)
def test_part_is_in_the_unit_of_its_whole(done: int, total: int, text: str) -> None:
    assert part_of(done, total) == text


def test_times_are_read_off_a_clock() -> None:
    assert [clock(seconds) for seconds in (7.9, 760, 3753)] == ["0:07", "12:40", "1:02:33"]
    assert [human_time(seconds) for seconds in (9.34, 59.96, 72)] == ["9.3 s", "1:00", "1:12"]


def test_outcome_has_a_rate_unless_it_took_no_time() -> None:
    assert outcome(6_940_000_000, 72) == "6.94 GB in 1:12, 96.4 MB/s"
    assert outcome(6_940_000_000, 0.01) == "6.94 GB in 0.0 s"


def test_standing_says_only_what_is_known() -> None:
    assert standing(5, 10, None, None) == ["5 of 10 B"]
    assert standing(5, 10, 2.0, 2.5) == ["5 of 10 B", "2 B/s", "0:02 left"]
    assert standing(12, 10, 2.0, None) == ["12 B", "2 B/s"]  # more than was announced
