"""The screenshots of docs/page.md: `python -m tests.page.screenshots` draws them anew into docs/images.

The page is the real one. The pictures on it are drawn (landscapes.py), since no model of the tests makes good ones.
Text is in whatever the system calls system-ui.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.page.browsing import PHONE, chromium, visiting
from tests.page.door import Door, open_door
from tests.page.starts import loaded, loading

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
DESK = {"width": 1280, "height": 832}
LARGEST_BYTES = 150_000
QUALITY = 82
PROMPT = "Morning in the hills, thin mist, a low sun, ink and wash"
EARLIER = [
    ("Layered ridges before dawn, mist in the valleys", "3:2", 314),
    ("The last light on a far range", "1:1", 271),
    ("Blue hour, a quiet pass", "16:9", 162),
    ("A tall peak under a pale moon", "2:3", 577),
    ("Green hills after rain", "4:3", 141),
    ("Evening in the highlands, slow clouds", "1:1", 693),
    ("Red mesas, wide and still", "21:9", 236),
]


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    with chromium() as browser:
        for scheme in ("light", "dark"):
            with shown(browser, viewport=DESK, color_scheme=scheme) as (door, page):
                make(page, door)
                save(page, f"page-{scheme}")
        phone = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
        with shown(browser, color_scheme="light", **phone) as (door, page):
            door.hold()
            make(page, door, until=1 + 3)
            page.locator("#stage").scroll_into_view_if_needed()
            page.evaluate("document.getElementById('generate').scrollIntoView({block: 'start'})")
            save(page, "page-phone")
        with shown(browser, viewport=DESK, color_scheme="light") as (door, page):
            door.state, door.cold_start = "starting", loading(4_310_000_000)
            page.reload()
            expect(page.locator("#trouble .running").first).to_be_visible()
            settled(page)
            save(page, "page-loading")
    return 0


@contextmanager
def shown(browser: Browser, **options: Any) -> Iterator[tuple[Door, Page]]:
    with open_door(size=640) as door:
        door.cold_start = loaded()
        for at, (prompt, shape, seed) in enumerate(EARLIER):
            door.earlier(f"earlier-{at}", prompt, seed=seed, ago_s=60 * at, aspect_ratio=shape)
        hosts = {urlsplit(address).netloc for address in (door.address, door.images)}
        with visiting(browser, door.address, hosts, reduced_motion="reduce", **options) as page:
            settled(page)
            yield door, page
            door.release()


def make(page: Page, door: Door, until: int | None = None) -> None:
    """Two pictures, whole or as far as some steps."""
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("2718")
    page.get_by_role("radio", name="4:3").check()
    if until is None:
        page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_role("button", name="Generate", exact=True).click()
    if until is None:
        expect(page.locator("#stage .there")).to_have_count(2)
    else:
        door.let(until)
        expect(page.locator("#stage-line")).to_have_text(f"Step {until - 1} of 4")
    settled(page)


def settled(page: Page) -> None:
    """Wait for the fields, and for every picture that is in sight."""
    expect(page.get_by_label("Steps")).to_be_visible()
    page.evaluate(
        """() => Promise.all([...document.images]
          .filter((image) => !image.hidden && image.getBoundingClientRect().top < innerHeight)
          .map((image) => image.decode().catch(() => {})))"""
    )


def save(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    path = FOLDER / f"{name}.webp"
    Image.open(io.BytesIO(page.screenshot())).save(path, "webp", quality=QUALITY, method=6)
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > LARGEST_BYTES:
        raise SystemExit(
            f"{path} has {size} bytes, and {LARGEST_BYTES} are the most for a page of documentation"
        )


if __name__ == "__main__":
    sys.exit(main())
