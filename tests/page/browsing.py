"""A real Chromium with a page open in it, and what must hold of every visit: nothing foreign, nothing broken."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ELSEWHERE = "gateway.test"
# The system's Chromium, which may be root's in a container, and talks to nobody by itself.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # A name that is not this machine's: what browsers allow a page over plain HTTP differs there.
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
]
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
TIMEOUT_MS = 20_000
# What Chromium says of every answer that is no 2xx, wanted or not, and of a header that it heeds over TLS only.
NOTES = ("Failed to load resource", "The Cross-Origin-Opener-Policy header has been ignored")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """What a page did besides what the test looks at."""

    hosts: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(NOTES):
            self.errors.append(message.text)


@contextlib.contextmanager
def visiting(browser: Browser, address: str, hosts: set[str], **options: Any) -> Iterator[Page]:
    """The page at `address`. Fails where it asked another host for anything, or an error reached the console."""
    visit = Visit()
    options.setdefault("viewport", DESKTOP)
    with contextlib.closing(browser.new_context(**options)) as context:
        context.set_default_timeout(TIMEOUT_MS)
        context.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
        page = context.new_page()
        page.on("console", visit.note)
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.goto(address)
        yield page
    assert not visit.errors, visit.errors
    assert visit.hosts - {""} <= hosts, visit.hosts  # data: has none
