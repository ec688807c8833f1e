"""The page before the whole product: the real gateway, the real runner, the small model, and a real Chromium."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import Deployment
from tests.page.browsing import chromium, visiting
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import GatewayServer

pytestmark = [pytest.mark.system_program("chromium"), pytest.mark.slow]

MODEL_MS = 120_000
LONG_SEED = 2**62 + 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_from_a_model_that_loads_to_pictures_in_the_gallery(
    deployment: Deployment, browser: Browser
) -> None:
    environment = deployment.environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        COG_MAX_CONCURRENCY="1",
        # A folder of its own: the gallery shows what other tests made in the same bucket.
        IMAGE_PREFIX="page",
    )
    with GatewayServer(environment, REPOSITORY, wait_until_ready=False) as gateway:
        hosts = {urlsplit(url).netloc for url in (gateway.url, environment["AWS_ENDPOINT_URL_S3"])}
        with visiting(browser, gateway.url, hosts) as page:
            expect(page.get_by_role("heading", name="The model is loading")).to_be_visible()
            phases = page.get_by_role("list", name="Phases of the start")
            expect(phases).to_contain_text("Load libraries", timeout=MODEL_MS)
            page.get_by_label("Prompt", exact=True).fill("a fox")
            # A server that loads may not describe its inputs yet.
            expect(page.get_by_label("Seed")).to_be_visible(timeout=MODEL_MS)
            page.get_by_label("Seed").fill(str(LONG_SEED))
            page.get_by_role("radio", name="2", exact=True).check()
            page.get_by_role("button", name="Generate", exact=True).click()

            made = page.locator("#stage .there")
            expect(made).to_have_count(2, timeout=MODEL_MS)
            expect(page.locator("#pill")).to_have_text("Ready")
            expect(made.nth(1)).to_contain_text(f"Seed {LONG_SEED + 1}")
            page.get_by_text("How this server started").click()
            expect(page.locator("#fold-content")).to_contain_text("ready after")
            expect(page.locator("#fold-content")).to_contain_text("Read the weights")

            page.reload()
            earlier = page.locator("#gallery-list figure")
            expect(earlier).to_have_count(2)
            expect(earlier.nth(1)).to_contain_text(f"Seed {LONG_SEED + 1}")
            pixels = "image => image.decode().then(() => image.naturalWidth)"
            assert earlier.nth(1).get_by_role("img").evaluate(pixels) == 256

            page.get_by_label("Steps").fill("3")
            page.get_by_role("button", name="Generate", exact=True).click()
            expect(page.get_by_role("heading", name="This could not be made")).to_be_visible()
            expect(page.locator("#problem-words")).to_contain_text("4")
