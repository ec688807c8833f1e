"""Whose turn it is, decided without a device."""

import time
from collections.abc import Hashable
from concurrent.futures import Future
from threading import Event

import pytest

from diffusion.line import Job, Line


def job(name: str, images: int = 1, group: Hashable = "square") -> Job[str]:
    return Job(group, tuple(Future() for _ in range(images)), Event(), name)


def line_of(*jobs: Job[str]) -> Line[str]:
    line: Line[str] = Line()
    for one in jobs:
        line.add(one)
    return line


def names(taken: list[tuple[Job[str], int]]) -> list[str]:
    return [f"{one.detail}{index}" for one, index in taken]


def test_requests_are_served_in_the_order_they_came():
    line = line_of(job("a"), job("b"), job("c"))

    assert [names(line.take(1)) for _ in range(4)] == [["a0"], ["b0"], ["c0"], []]


def test_a_request_for_many_images_lets_others_go_between_them():
    line = line_of(job("a", 3), job("b"), job("c", 2))

    assert [names(line.take(1))[0] for _ in range(6)] == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_images_of_one_group_go_together_and_those_of_others_keep_their_places():
    line = line_of(job("a"), job("wide", group="wide"), job("b"), job("c"))

    assert names(line.take(8)) == ["a0", "b0", "c0"]
    assert names(line.take(8)) == ["wide0"]


def test_one_of_every_request_comes_before_a_second_of_any():
    line = line_of(job("a", 3), job("b", 2))

    assert names(line.take(4)) == ["a0", "b0", "a1", "b1"]
    assert names(line.take(4)) == ["a2"]


def test_no_more_are_taken_than_there_is_room_for():
    line = line_of(job("a", 2), job("b", 2))

    assert names(line.take(3)) == ["a0", "b0", "a1"]
    assert names(line.take(0)) == []
    assert names(line.take(3)) == ["b1"]


def test_who_comes_later_joins_its_group_only_ahead_of_everybody_of_another():
    # Otherwise a group that never ends would keep the others waiting for ever.
    line = line_of(job("b"), job("wide", group="wide"), job("c"))

    assert names(line.take(8, joining="square")) == ["b0"]
    assert names(line.take(8, joining="square")) == []
    assert names(line.take(8)) == ["wide0"]


def test_who_may_not_begin_keeps_its_place():
    begun = job("begun", 2)
    line = line_of(begun, job("new"))
    assert names(line.take(1)) == ["begun0"]

    assert names(line.take(8, eligible=lambda one: one is begun)) == ["begun1"]
    assert names(line.take(8)) == ["new0"]


def test_the_first_waits_for_company_until_there_is_enough_or_its_patience_ends():
    first = job("first")
    line = line_of(first)
    assert 0 < line.seconds_for_company(2, patience=100) <= 100

    line.add(job("wide", group="wide"))
    assert line.seconds_for_company(2, patience=100) > 0
    line.add(job("second"))
    assert line.seconds_for_company(2, patience=100) == 0
    first.asked = time.perf_counter() - 200
    assert line.seconds_for_company(8, patience=100) == 0
    assert Line[str]().seconds_for_company(8, patience=100) == 0


def test_a_request_ends_once_however_often_it_is_ended():
    one = job("a", 3)
    one.settle(0, "picture")

    one.fail(ValueError("no"))
    one.drop()
    one.settle(1, "too late")

    assert one.images[0].result() == "picture"
    for image in one.images[1:]:
        with pytest.raises(ValueError, match="no"):
            image.result()
    assert one.open == 0


def test_nobody_hears_of_what_was_dropped():
    one = job("a", 2)

    one.drop()
    one.settle(0, "picture")

    assert all(image.cancelled() for image in one.images)
