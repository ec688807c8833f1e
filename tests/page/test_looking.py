"""What the page says of the model, what it shows of earlier pictures, and whom it lets in."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.page.conftest import Open
from tests.page.door import Door
from tests.page.starts import failed, loaded, loading

pytestmark = pytest.mark.system_program("chromium")


def generate(page: Page, prompt: str) -> None:
    expect(page.get_by_label("Steps")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate", exact=True).click()


def give_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Continue").click()


def phase(page: Page, name: str) -> Any:
    return page.get_by_role("listitem").filter(has_text=name)


def test_a_model_that_loads_is_watched_until_it_is_ready(door: Door, open_page: Open) -> None:
    door.state, door.cold_start = "starting", loading(read=2_100_000_000)
    page = open_page()

    expect(page.get_by_role("heading", name="The model is loading")).to_be_visible()
    expect(page.locator("#pill")).to_have_text("Loading the model")
    expect(page.get_by_text("2.10 GB of 6.94 GB read and checked")).to_be_visible()
    meter = page.get_by_role("progressbar", name="Loading")
    assert meter.evaluate("meter => meter.value") == pytest.approx(2.1 / 6.938)
    expect(phase(page, "Read the weights")).to_have_class("running")
    expect(phase(page, "Find the model")).not_to_have_class("running")

    generate(page, "a fox")  # who cannot wait is remembered
    expect(page.locator("#stage-line")).to_contain_text("begins by itself")
    door.cold_start = loading(read=5_000_000_000)
    expect(page.get_by_text("5.00 GB of 6.94 GB read and checked")).to_be_visible()
    door.state, door.cold_start = "ready", loaded()

    expect(page.get_by_role("heading", name="The model is loading")).to_be_hidden()
    expect(page.locator("#pill")).to_have_text("Ready")
    expect(page.locator("#stage").get_by_role("img", name="a fox")).to_be_visible()
    page.get_by_text("How this server started").click()
    expect(page.locator("#fold-content")).to_contain_text("ready after 11.0 s, 6.94 GB of weights")
    expect(phase(page, "Read the weights")).to_contain_text("6.94 GB at 867 MB/s")
    expect(page.locator("#fold .waited").first).to_be_visible()


def test_a_reload_while_a_wish_waits_for_the_model(door: Door, open_page: Open) -> None:
    door.state = "starting"
    page = open_page()
    generate(page, "a fox")
    expect(page.locator("#stage-line")).to_contain_text("begins by itself")

    page.reload()
    expect(page.locator("#stage-line")).to_contain_text("begins by itself")
    door.state = "ready"

    expect(page.locator("#stage").get_by_role("img", name="a fox")).to_be_visible()
    assert len(door.predictions) == 1


def test_fields_come_with_the_model_as_they_were_filled_in(door: Door, open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Seed").fill("41")
    door.state, door.describes = "starting", False
    page.reload()
    expect(page.get_by_text("The other choices come with the model.")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("a fox")

    door.state, door.describes = "ready", True

    expect(page.get_by_label("Seed")).to_have_value("41")
    expect(page.get_by_text("The other choices come with the model.")).to_be_hidden()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def again_while_the_model_loads(door: Door, page: Page) -> None:
    """With other values remembered from when the fields were there; then the model goes on loading."""
    page.get_by_label("Seed").fill("11")
    page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Keep out").fill("fog")
    door.state, door.describes = "starting", False
    page.reload()
    expect(page.get_by_text("The other choices come with the model.")).to_be_visible()
    page.locator("#gallery-list").get_by_role("button").click()
    page.get_by_role("button", name="Again with this seed").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox")
    expect(page.locator("#announcements")).to_contain_text("this picture\u2019s prompt and seed")


def expect_the_picture_in_the_fields(page: Page, seed: int) -> None:
    expect(page.get_by_label("Seed")).to_have_value(str(seed))
    expect(page.get_by_role("radio", name="16:9")).to_be_checked()
    expect(page.get_by_role("radio", name="1", exact=True)).to_be_checked()
    expect(page.get_by_label("Steps")).to_have_value("4")
    expect(page.get_by_label("Keep out")).to_have_value("")


def test_again_while_the_model_loads_fills_the_fields_when_they_come(
    door: Door, open_page: Open
) -> None:
    door.earlier("old", "a fox", seed=4711, aspect_ratio="16:9", num_inference_steps=4)
    page = open_page()
    again_while_the_model_loads(door, page)

    door.state, door.describes = "ready", True

    expect_the_picture_in_the_fields(page, 4711)
    generate(page, "a fox at dusk")
    expect(page.locator("#stage .there")).to_be_visible()
    assert json.loads(door.bodies[0])["input"] == {
        "prompt": "a fox at dusk",
        "aspect_ratio": "16:9",
        "num_inference_steps": 4,
        "seed": 4711,
        "previews": True,
    }


@pytest.mark.parametrize("reloads", [False, True])
@pytest.mark.parametrize("seed", [4711, 2**63 - 1])
def test_again_while_the_model_loads_is_sent_before_the_fields_come(
    door: Door, open_page: Open, seed: int, reloads: bool
) -> None:
    door.earlier("old", "a fox", seed=seed, aspect_ratio="16:9", num_inference_steps=4)
    page = open_page()
    again_while_the_model_loads(door, page)
    if reloads:
        page.reload()

    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#stage-line")).to_contain_text("begins by itself")
    door.state, door.describes = "ready", True

    expect(page.locator("#stage .there")).to_be_visible()
    assert json.loads(door.bodies[0])["input"] == {
        "prompt": "a fox",
        "aspect_ratio": "16:9",
        "num_inference_steps": 4,
        "seed": seed,
    }
    expect_the_picture_in_the_fields(page, seed)


def test_a_setup_that_failed_says_why(door: Door, open_page: Open) -> None:
    door.state, door.cold_start = "setup_failed", failed()
    door.reason = "access denied on s3://models/demo/latest.json: check MODEL_PATH"
    page = open_page()

    expect(page.get_by_role("heading", name="The model could not be loaded")).to_be_visible()
    expect(page.get_by_label("The reason")).to_have_text(door.reason)
    expect(phase(page, "Read the weights")).to_contain_text("failed")


@pytest.mark.parametrize(
    ("state", "title"),
    [
        ("dead", "The model\u2019s process has ended"),
        ("stopping", "This server is about to stop"),
        ("stopped", "This server has stopped"),
    ],
)
def test_states_that_do_not_serve_are_explained(
    door: Door, open_page: Open, state: str, title: str
) -> None:
    door.state, door.reason = state, "the worker was killed"
    page = open_page()

    expect(page.get_by_role("heading", name=title)).to_be_visible()
    expect(page.get_by_label("The reason")).to_have_text("the worker was killed")
    door.state = "busy"
    expect(page.get_by_role("heading", name=title)).to_be_hidden()


def test_the_key_is_asked_for(door: Door, open_page: Open) -> None:
    door.key = "gw_secret"
    page = open_page()
    dialog = page.get_by_role("dialog", name="This server wants a key")
    expect(dialog).to_be_visible()
    expect(page.get_by_label("Key", exact=True)).to_be_focused()

    give_key(page, "gw_wrong")
    expect(dialog.get_by_role("alert")).to_contain_text("not known here")
    give_key(page, " gw_secret ")
    expect(dialog).to_be_hidden()
    generate(page, "a fox")

    expect(page.locator("#stage .there")).to_be_visible()
    kept = "[sessionStorage.getItem('key'), localStorage.getItem('key')]"
    assert page.evaluate(kept) == ["gw_secret", None]
    page.reload()
    expect(page.locator("#gallery-list img")).to_be_visible()  # without another question
    expect(dialog).to_be_hidden()


def test_what_only_those_with_a_key_may_see_comes_with_it(door: Door, open_page: Open) -> None:
    door.key, door.state, door.reason = "gw_secret", "setup_failed", "the bucket refused"
    page = open_page()
    expect(page.locator("#trouble-title")).to_have_text("The model could not be loaded")
    expect(page.locator("#trouble-reason")).to_be_hidden()

    give_key(page, "gw_secret")

    expect(page.get_by_label("The reason")).to_have_text("the bucket refused")


def test_a_key_is_remembered_where_the_person_says_so(door: Door, open_page: Open) -> None:
    door.key = "gw_secret"
    page = open_page()
    page.get_by_label("Remember it in this browser").check()
    give_key(page, "gw_secret")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("localStorage.getItem('key')") == "gw_secret"

    with page.expect_popup() as opened:
        page.evaluate("void window.open(location.href, '_blank', 'noopener')")
    other = opened.value
    expect(other.locator("#pill")).to_have_text("Ready")
    expect(other.get_by_role("dialog")).to_be_hidden()


def test_whoever_has_no_key_can_come_back_to_it(door: Door, open_page: Open) -> None:
    door.key = "gw_secret"
    page = open_page()
    page.get_by_role("button", name="Not now").click()
    generate(page, "a fox")
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.press("Escape")

    expect(page.get_by_role("heading", name="A key is needed")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    give_key(page, "gw_secret")
    expect(page.locator("#stage .there")).to_be_visible()


def test_earlier_pictures_come_a_page_at_a_time(door: Door, open_page: Open) -> None:
    for number in range(60):
        door.earlier(f"id-{number}", f"picture {number}", seed=number, ago_s=number)
    page = open_page()
    pictures = page.locator("#gallery-list figure")

    expect(pictures).to_have_count(24)
    page.get_by_role("button", name="Load more").click()
    expect(pictures).to_have_count(48)
    expect(pictures.nth(24).get_by_role("button")).to_be_focused()
    page.get_by_role("button", name="Load more").click()
    expect(pictures).to_have_count(60)
    expect(page.get_by_role("button", name="Load more")).to_be_hidden()
    assert pictures.all_text_contents() == [f"picture {n}Seed {n}" for n in range(60)]


def test_an_earlier_picture_seen_large(door: Door, open_page: Open) -> None:
    seed = 2**63 - 2
    door.earlier("old", "it's a fox", seed=seed, num_outputs=2, aspect_ratio="16:9")
    door.key = None
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Generated image, 2 of 2: it's a fox").click()
    viewer = page.get_by_role("dialog", name="Picture")
    expect(viewer).to_contain_text(str(seed + 1))

    viewer.get_by_role("button", name="Copy curl").click()
    expect(viewer.get_by_role("button", name="Copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    words = shlex.split(command.replace("$(uuidgen)", "some-id").replace("\\\n", ""))
    assert words[:4] == ["curl", f"{door.address}predictions/some-id", "-X", "PUT"]
    assert json.loads(words[-1]) == {
        "input": {"prompt": "it's a fox", "aspect_ratio": "16:9", "seed": seed + 1}
    }
    viewer.get_by_role("button", name="Again with this seed").click()

    expect(viewer).to_be_hidden()
    expect(page.get_by_label("Seed")).to_have_value(str(seed + 1))
    expect(page.get_by_role("radio", name="16:9")).to_be_checked()
    expect(page.get_by_role("radio", name="1", exact=True)).to_be_checked()


def test_the_curl_command_never_holds_the_key(door: Door, open_page: Open) -> None:
    door.key = "gw_secret"
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    give_key(page, "gw_secret")
    generate(page, "a fox")
    page.get_by_role("button", name="Copy curl").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()

    command = page.evaluate("navigator.clipboard.readText()")

    assert "gw_secret" not in command
    assert '-H "Authorization: Bearer $KEY"' in command


def test_a_picture_whose_address_has_run_out_is_asked_for_anew(door: Door, open_page: Open) -> None:
    page = open_page()
    door.earlier("old", "a fox", seed=7)

    def run_out(route: Route) -> None:
        door.signature = 2
        route.fulfill(status=403)

    page.route(re.compile("signature=1"), run_out)
    page.reload()

    picture = page.locator("#gallery-list img")
    expect(picture).to_have_attribute("src", re.compile("signature=2"))
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_pictures_that_cannot_be_listed_are_offered_again(door: Door, open_page: Open) -> None:
    door.earlier("old", "a fox")
    door.out_of_reach = True
    page = open_page()
    expect(page.get_by_role("alert")).to_contain_text("could not be listed")

    door.out_of_reach = False
    page.get_by_role("button", name="Load earlier pictures").click()

    expect(page.locator("#gallery-list img")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
