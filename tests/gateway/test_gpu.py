"""What the driver says reaches whoever reads; where it says nothing, late or never, nobody waits or fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pynvml
import pytest

from gateway.gpu import Card, Cards
from tests.support.nvml import Driver

LONG_S = 60.0


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.answers.set()


def has_card() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return bool(pynvml.nvmlDeviceGetCount())


def test_memory_and_use_of_every_card_are_what_the_driver_says(driver: Driver) -> None:
    cards = Cards(lambda: driver, patience_s=LONG_S)

    first, second = cards.read()

    assert first == Card(0, "NVIDIA L4", "GPU-0", 30 * 2**30, 80 * 2**30, 0.75)
    assert (second.memory_used, second.utilization) == (5 * 2**30, None)
    driver.used[0] = 2**30
    assert cards.read()[0].memory_used == 2**30
    cards.close()
    assert driver.stopped.wait(LONG_S)


def test_a_lost_card_is_left_out_and_the_others_are_not(driver: Driver) -> None:
    cards = Cards(lambda: driver, patience_s=LONG_S)
    driver.lost.add(0)

    assert [card.index for card in cards.read()] == [1]


def test_while_the_driver_hangs_the_last_reading_stands_and_it_is_not_asked_again(
    driver: Driver,
) -> None:
    cards = Cards(lambda: driver, patience_s=LONG_S)
    before = cards.read()
    driver.answers.clear()
    hanging = threading.Thread(target=cards.read, daemon=True)  # this one waits for LONG_S
    hanging.start()
    while driver.calls < 2:
        hanging.join(0.01)

    # Were it to wait as well, the test would not end in time.
    assert [cards.read() for _ in range(3)] == [before] * 3
    assert driver.calls == 2

    driver.answers.set()
    hanging.join()


def test_what_is_too_old_is_not_told(driver: Driver) -> None:
    cards = Cards(lambda: driver, patience_s=0.0, stale_after_s=-1.0)
    while driver.calls < 2:  # a reading was there, and another was begun
        assert cards.read() == ()


def test_a_driver_that_does_not_start_is_asked_once_and_then_left_alone() -> None:
    loads = []

    def load() -> Driver:
        loads.append(1)
        return Driver(starts=False)

    cards = Cards(load, patience_s=LONG_S)

    assert [cards.read(), cards.read()] == [(), ()]
    assert len(loads) == 1


@pytest.mark.skipif(has_card(), reason="needs a machine without a card")
def test_a_machine_without_a_card_says_nothing_and_logs_nothing() -> None:
    code = """
import logging; logging.basicConfig(level="INFO")
from gateway.gpu import Cards; print(Cards(patience_s=60).read())
"""

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (told.stdout, told.stderr) == ("()\n", "")


@pytest.mark.skipif(not has_card(), reason="needs a card")
def test_a_real_card_tells_its_memory_and_use() -> None:
    cards = Cards(patience_s=LONG_S)

    card = cards.read()[0]
    cards.close()

    assert card.memory_total is not None
    assert card.memory_used is not None
    assert 0 <= card.memory_used <= card.memory_total
    assert card.utilization is None or 0 <= card.utilization <= 1
