"""axe finds no serious fault of accessibility in the page's states, in light and dark, on a phone and on a desk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.browsing import DESKTOP, PHONE
from tests.page.conftest import Open
from tests.page.door import Door
from tests.page.starts import failed, loaded, loading

pytestmark = pytest.mark.system_program("chromium")

SERIOUS = ("serious", "critical")
WAYS = [
    pytest.param({"viewport": viewport, "color_scheme": scheme}, id=f"{name}-{scheme}")
    for (name, viewport), scheme in itertools.product(
        (("desk", DESKTOP), ("phone", PHONE)), ("light", "dark")
    )
]


def faults(page: Page) -> list[str]:
    # Colours are judged as they end up, and not on the way.
    page.emulate_media(reduced_motion="reduce")
    found: dict[str, Any] = Axe().run(page).response
    assert found["passes"]
    return [
        f"{violation['id']}: {node['html'][:200]} {node['failureSummary']}"
        for violation in found["violations"]
        if violation["impact"] in SERIOUS
        for node in violation["nodes"]
    ]


def begun(page: Page, prompt: str = "a fox in deep snow") -> None:
    expect(page.get_by_label("Steps")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_role("button", name="Generate", exact=True).click()


def empty(door: Door, page: Page) -> None:
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    page.get_by_text("More", exact=True).click()


def wrong_input(door: Door, page: Page) -> None:
    page.get_by_label("Seed").fill("-1")
    begun(page)
    expect(page.get_by_text("Enter a whole number")).to_be_visible()


def under_way(door: Door, page: Page) -> None:
    door.hold()
    begun(page)
    door.let(1 + 4 + 2)
    expect(page.locator("#stage-line")).to_have_text("Image 2 of 2: step 2 of 4")


def done(door: Door, page: Page) -> None:
    door.earlier("old", "a heron in reeds")
    page.reload()
    begun(page)
    expect(page.locator("#stage .there")).to_have_count(2)
    expect(page.locator("#gallery-list img")).to_be_visible()
    page.get_by_text("How this server started").click()


def seen_large(door: Door, page: Page) -> None:
    door.earlier("old", "a heron in reeds")
    page.reload()
    page.locator("#gallery-list button").click()
    expect(page.get_by_role("dialog", name="Picture")).to_be_visible()


def failed_to_make(door: Door, page: Page) -> None:
    door.failure = "steps is 3; this checkpoint was made for 4"
    begun(page)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def key_wanted(door: Door, page: Page) -> None:
    door.key = "gw_secret"
    page.reload()
    page.get_by_label("Key", exact=True).fill("gw_wrong")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_be_visible()


def model_loading(door: Door, page: Page) -> None:
    door.state, door.cold_start = "starting", loading(2_000_000_000)
    page.reload()
    expect(page.locator("#trouble")).to_be_visible()


def setup_failed(door: Door, page: Page) -> None:
    door.state, door.cold_start, door.reason = "setup_failed", failed(), "access denied"
    page.reload()
    expect(page.locator("#trouble pre")).to_be_visible()


STATES: list[Callable[[Door, Page], None]] = [
    *(empty, wrong_input, under_way, done, seen_large, failed_to_make),
    *(key_wanted, model_loading, setup_failed),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_no_serious_fault(
    door: Door, open_page: Open, state: Callable[[Door, Page], None], way: dict[str, Any]
) -> None:
    door.cold_start = loaded()
    page = open_page(**way)
    state(door, page)

    assert faults(page) == []


def test_what_happens_is_said(door: Door, open_page: Open) -> None:
    page = open_page()
    page.evaluate(
        """() => {
          window.said = [];
          const region = document.getElementById("announcements");
          new MutationObserver(() => window.said.push(region.textContent)).observe(region, {childList: true});
        }"""
    )
    begun(page)
    expect(page.locator("#stage .there")).to_have_count(2)
    expect(page.locator("#announcements")).to_have_text("All done.")

    said = page.evaluate("window.said")
    assert said == [
        "2 images are being made.",
        "Image 1 of 2 is there.",
        "Image 2 of 2 is there.",
        "All done.",
    ]


def test_nothing_moves_where_that_is_not_wanted(door: Door, open_page: Open) -> None:
    door.state, door.cold_start = "starting", loading(2_000_000_000)
    page = open_page(reduced_motion="reduce")
    expect(page.locator("#trouble .running .bar").first).to_be_visible()

    assert page.evaluate("document.getAnimations().length") == 0
