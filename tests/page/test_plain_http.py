"""The page over plain HTTP from another machine, where a browser has no clipboard and no UUIDs for it."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.page.browsing import ELSEWHERE, visiting
from tests.page.door import Door

pytestmark = pytest.mark.system_program("chromium")


def test_pictures_are_made_and_the_command_is_copied(door: Door, browser: Browser) -> None:
    here = urlsplit(door.address)
    elsewhere = f"{ELSEWHERE}:{here.port}"
    hosts = {elsewhere, urlsplit(door.images).netloc}
    with visiting(browser, f"http://{elsewhere}/", hosts) as page:
        assert page.evaluate("[isSecureContext, typeof crypto.randomUUID]") == [False, "undefined"]
        expect(page.get_by_label("Steps")).to_be_visible()
        prompt = page.get_by_label("Prompt", exact=True)
        prompt.fill("a fox")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.locator("#stage .there")).to_be_visible()
        page.get_by_role("button", name="Copy curl").click()
        expect(page.get_by_role("button", name="Copied")).to_be_focused()

        prompt.fill("")
        prompt.press("Control+V")

        assert prompt.input_value().startswith(f'curl "http://{elsewhere}/predictions/$(uuidgen)"')
