"""A door and a Chromium for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page

from tests.page.browsing import chromium, visiting
from tests.page.door import Door, open_door

Open = Callable[..., Page]


# Playwright runs an event loop in this thread while it is open: no longer than a file of tests.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def door() -> Iterator[Door]:
    with open_door() as door:
        yield door


@pytest.fixture
def open_page(browser: Browser, door: Door) -> Iterator[Open]:
    """Opens the page in a fresh browser profile, with Playwright's options for one."""
    hosts = {urlsplit(address).netloc for address in (door.address, door.images)}
    with ExitStack() as visits:

        def open_page(**options: Any) -> Page:
            return visits.enter_context(visiting(browser, door.address, hosts, **options))

        yield open_page
        door.release()
