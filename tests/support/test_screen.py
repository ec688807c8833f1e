"""The screen shows what a terminal's would, and refuses what it does not know."""

from __future__ import annotations

import pytest

from tests.support.screen import Screen


def test_text_wraps_at_the_edge_and_not_before() -> None:
    screen = Screen(5, 10)
    screen.feed("12345\r\n1234567\r\nab")
    assert screen.lines == ["12345", "12345", "67", "ab"]


def test_cursor_goes_up_no_further_than_the_window_and_wipes_a_line() -> None:
    screen = Screen(10, 3)
    screen.feed("one\r\ntwo\r\nthree\r\nfour\x1b[9A\r\x1b[2Kx")
    assert screen.lines == ["one", "x", "three", "four"]


def test_sequence_may_arrive_in_pieces() -> None:
    screen = Screen(10, 3)
    screen.feed("a\x1b[3")
    screen.feed("2mb\x1b]mark")
    screen.feed(" 1\x07c")
    assert (screen.lines, screen.colours, screen.marks) == (["abc"], {"32"}, ["mark 1"])


def test_narrower_window_wraps_what_it_shows_and_a_wider_one_joins_it_again() -> None:
    screen = Screen(8, 5)
    screen.feed("12345678\r\nabcdef")
    screen.resize(4, 5)
    assert screen.lines == ["1234", "5678", "abcd", "ef"]
    assert (screen.row, screen.column) == (3, 2)
    screen.resize(10, 5)
    assert screen.lines == ["12345678", "abcdef"]
    assert (screen.row, screen.column) == (1, 6)


def test_narrower_window_of_another_kind_cuts_off() -> None:
    screen = Screen(8, 5)
    screen.feed("12345678\r\nab")
    screen.resize(4, 5, wraps=False)
    assert screen.lines == ["1234", "ab"]


@pytest.mark.parametrize("sequence", ["\x1b[?25l", "\x1b[2J", "\x1b[K"])
def test_what_it_does_not_know_fails(sequence: str) -> None:
    with pytest.raises(AssertionError, match="unexpected"):
        Screen(8, 5).feed(sequence)
