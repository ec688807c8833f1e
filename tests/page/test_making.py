"""From a prompt to its pictures on the screen, and all that can come between."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.page.browsing import PHONE
from tests.page.conftest import Open
from tests.page.door import Door, Refusal

pytestmark = pytest.mark.system_program("chromium")

LARGEST_SEED = 2**63 - 1


def write(page: Page, prompt: str) -> None:
    expect(page.get_by_label("Steps")).to_be_visible()  # the fields have come
    page.get_by_label("Prompt", exact=True).fill(prompt)


def generate(page: Page, prompt: str) -> None:
    write(page, prompt)
    page.get_by_role("button", name="Generate", exact=True).click()


def image(page: Page, prompt: str) -> Locator:
    return page.locator("#stage").get_by_role("img", name=f"Generated image: {prompt}")


def expect_seen(image: Locator) -> None:
    """It is on the screen, with pixels of its own."""
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth") > 0


def test_from_empty_to_a_picture(door: Door, open_page: Open) -> None:
    page = open_page()
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    expect(page.locator("#pill")).to_have_text("Ready")

    generate(page, "a fox in deep snow")

    expect_seen(image(page, "a fox in deep snow"))
    expect(page.locator("#stage")).to_contain_text("Seed 5555")
    expect(page.get_by_text("Nothing here yet")).to_be_hidden()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    assert json.loads(door.bodies[0])["input"] == {"prompt": "a fox in deep snow", "previews": True}


def test_fields_follow_the_schema(door: Door, open_page: Open) -> None:
    page = open_page()
    write(page, "a fox")

    shapes = page.get_by_role("group", name="Shape").get_by_role("radio")
    assert [shape.get_attribute("value") for shape in shapes.all()] == [
        *("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")
    ]
    expect(page.get_by_role("radio", name="1:1")).to_be_checked()
    counts = page.get_by_role("group", name="Images").get_by_role("radio")
    assert [count.get_attribute("value") for count in counts.all()] == ["1", "2", "3", "4"]
    page.get_by_role("radio", name="16:9").check()
    page.get_by_role("radio", name="3", exact=True).check()
    page.get_by_label("Steps").fill("4")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Keep out").fill("fog")
    page.get_by_label("File format").select_option("webp")
    page.get_by_role("button", name="Generate", exact=True).click()

    expect(page.locator("#stage .there")).to_have_count(3)
    assert json.loads(door.bodies[0])["input"] == {
        "prompt": "a fox",
        "negative_prompt": "fog",
        "aspect_ratio": "16:9",
        "num_inference_steps": 4,
        "output_format": "webp",
        "num_outputs": 3,
        "previews": True,
    }


def test_what_does_not_fit_is_said_beside_its_field(door: Door, open_page: Open) -> None:
    page = open_page()
    write(page, " ")
    page.get_by_label("Steps").fill("51")
    page.get_by_label("Seed").fill(str(LARGEST_SEED + 1))
    page.get_by_role("button", name="Generate", exact=True).click()

    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_label("Prompt", exact=True)).to_have_accessible_description(
        "Say what the picture should show."
    )
    expect(page.get_by_text("Enter a whole number from 1 to 50.")).to_be_visible()
    expect(page.get_by_text(f"Enter a whole number from 0 to {LARGEST_SEED}.")).to_be_visible()
    assert door.bodies == []


def test_what_the_server_finds_wrong_is_said_beside_its_field(door: Door, open_page: Open) -> None:
    wrong = {"loc": ["body", "input", "seed"], "msg": "must be a prime", "type": "value_error"}
    door.refusals.append(Refusal(422, [wrong]))
    page = open_page()
    page.get_by_label("Seed").fill("8")
    generate(page, "a fox")

    expect(page.get_by_label("Seed")).to_be_focused()
    expect(page.get_by_text("must be a prime", exact=True)).to_be_visible()


def test_steps_are_shown_with_previews(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    write(page, "a fox")
    page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_role("button", name="Generate", exact=True).click()
    first = page.get_by_role("progressbar", name="Image 1 of 2")
    expect(page.locator("#stage-line")).to_have_text("In line")

    door.let(1 + 2)  # to begin, and two steps

    expect(first).to_have_attribute("aria-valuetext", "step 2 of 4")
    expect(page.locator("#stage-line")).to_have_text("Image 1 of 2: step 2 of 4")
    assert page.locator("#stage .preview").first.get_attribute("src").startswith("data:image/jpeg")  # type: ignore[union-attr]
    door.let(2 + 1)  # the first is stored, the second at its first step
    expect_seen(page.get_by_role("img", name="Generated image, 1 of 2: a fox"))
    expect(page.locator("#stage-line")).to_have_text("Image 2 of 2: step 1 of 4")
    door.release()
    expect_seen(page.get_by_role("img", name="Generated image, 2 of 2: a fox"))
    expect(page.locator("#stage")).to_contain_text("Seed 5556")


@pytest.mark.parametrize("seed", [2**53 + 1, LARGEST_SEED - 1])
def test_seeds_beyond_a_doubles_integers_stay_exact(door: Door, open_page: Open, seed: int) -> None:
    page = open_page()
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("radio", name="2", exact=True).check()
    generate(page, "a fox")

    expect(page.locator("#stage .there")).to_have_count(2)
    expect(page.locator("#stage")).to_contain_text(f"Seed {seed}")
    expect(page.locator("#stage")).to_contain_text(f"Seed {seed + 1}")
    page.get_by_role("button", name="Again with this seed").nth(1).click()
    expect(page.get_by_label("Seed")).to_have_value(str(seed + 1))
    page.get_by_role("button", name="Generate", exact=True).click()
    # The first two have moved to the gallery, whose second knows only the first's seed.
    expect(page.locator("#gallery-list")).to_contain_text(f"Seed {seed + 1}")
    expect(image(page, "a fox")).to_be_visible()

    assert [json.loads(body)["input"]["seed"] for body in door.bodies] == [seed, seed + 1]
    assert "num_outputs" not in json.loads(door.bodies[1])["input"]


def test_a_failure_is_shown_kindly_and_can_be_tried_again(door: Door, open_page: Open) -> None:
    door.failure = "steps is 3; this checkpoint was made for 4. Send num_inference_steps 4"
    page = open_page()
    generate(page, "a fox")

    expect(page.get_by_role("heading", name="This could not be made")).to_be_visible()
    expect(page.locator("#problem-words")).to_have_text(door.failure)
    door.failure = None
    page.get_by_role("button", name="Try again").click()

    expect_seen(image(page, "a fox"))
    expect(page.get_by_role("heading", name="This could not be made")).to_be_hidden()
    assert len(door.predictions) == 2  # what failed stays failed under its id


def test_a_full_queue_says_how_long_and_offers_again(door: Door, open_page: Open) -> None:
    door.refusals.append(Refusal(429, "The queue is full: 8 predictions wait.", 7))
    page = open_page()
    generate(page, "a fox")

    expect(page.get_by_role("heading", name="There is no room just now")).to_be_visible()
    expect(page.locator("#problem-words")).to_have_text("The queue is full: 8 predictions wait.")
    expect(page.locator("#problem-wait")).to_have_text("Likely to work in 7 s.")
    page.get_by_role("button", name="Try again").click()

    expect_seen(image(page, "a fox"))
    assert len(door.predictions) == 1


def test_cancel(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    generate(page, "a fox")
    door.let(2)
    expect(page.locator("#stage-line")).to_have_text("Step 1 of 4")

    page.get_by_role("button", name="Cancel").click()

    expect(page.locator("#stage-line")).to_have_text("Canceled")
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_focused()
    [prediction] = door.predictions.values()
    assert prediction.answer["status"] == "canceled"


def test_a_reload_in_the_middle_loses_nothing(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    page.get_by_label("Seed").fill(str(LARGEST_SEED))
    page.get_by_role("radio", name="3:2").check()
    generate(page, "a fox in deep snow")
    door.let(3)
    expect(page.locator("#stage-line")).to_have_text("Step 2 of 4")

    page.reload()

    expect(page.locator("#stage-line")).to_have_text("Step 2 of 4")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox in deep snow")
    expect(page.get_by_role("radio", name="3:2")).to_be_checked()
    expect(page.get_by_label("Seed")).to_have_value(str(LARGEST_SEED))
    door.release()
    expect_seen(image(page, "a fox in deep snow"))
    expect(page.locator("#stage")).to_contain_text(f"Seed {LARGEST_SEED}")
    assert len(door.predictions) == 1


def test_a_reload_after_the_end_finds_the_result(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    generate(page, "a fox")
    expect(page.locator("#stage-line")).to_have_text("In line")
    address = page.url
    page.goto("about:blank")
    door.release()
    [prediction] = door.predictions.values()
    while not prediction.over:
        page.wait_for_timeout(10)

    page.goto(address)

    expect_seen(image(page, "a fox"))
    assert len(door.predictions) == 1


def test_a_lost_connection_is_found_again(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    generate(page, "a fox")
    door.let(2)
    expect(page.locator("#stage-line")).to_have_text("Step 1 of 4")

    door.out_of_reach = True
    door.cut += 1

    expect(page.locator("#stage-line")).to_contain_text("The connection is lost")
    door.release()
    [prediction] = door.predictions.values()
    while not prediction.over:
        page.wait_for_timeout(10)
    door.out_of_reach = False

    expect_seen(image(page, "a fox"))
    assert ("GET", f"/predictions/{prediction.answer['id']}") in door.asked
    assert len(door.predictions) == 1


def test_a_stream_that_breaks_off_is_joined_again(door: Door, open_page: Open) -> None:
    door.hold()
    page = open_page()
    generate(page, "a fox")
    door.let(2)
    expect(page.locator("#stage-line")).to_have_text("Step 1 of 4")

    door.cut += 1
    door.let(2)

    expect(page.locator("#stage-line")).to_have_text("Step 3 of 4")
    door.release()
    expect_seen(image(page, "a fox"))


def test_by_keyboard_alone(door: Door, open_page: Open) -> None:
    page = open_page()
    expect(page.get_by_label("Steps")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("a fox")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # from 1:1 to 16:9
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # from one to two
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("41")
    page.keyboard.press("Tab")  # More
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#stage .there")).to_have_count(2)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Again with this seed").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(" at dusk")
    page.keyboard.press("Control+Enter")
    expect_seen(image(page, "a fox at dusk"))

    sent = [json.loads(body)["input"] for body in door.bodies]
    assert sent[0] == {
        "prompt": "a fox",
        "aspect_ratio": "16:9",
        "num_outputs": 2,
        "seed": 41,
        "previews": True,
    }
    assert (sent[1]["prompt"], sent[1]["seed"]) == ("a fox at dusk", 41)


@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 640}])
def test_a_phone_has_nothing_to_scroll_sideways(
    door: Door, open_page: Open, viewport: dict[str, int]
) -> None:
    door.earlier("long", "W" * 300, seed=LARGEST_SEED, aspect_ratio="21:9")
    door.earlier("tall", "a tower", aspect_ratio="9:21")
    page = open_page(viewport=viewport, has_touch=True, is_mobile=True)
    page.get_by_text("More", exact=True).click()
    page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_label("Seed").fill(str(LARGEST_SEED - 1))
    generate(page, "M" * 200)
    expect(page.locator("#stage .there")).to_have_count(2)
    width = "document.documentElement.scrollWidth - window.innerWidth"

    assert page.evaluate(width) <= 0
    door.failure = "x" * 400
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    assert page.evaluate(width) <= 0
    page.locator("#gallery-list button").first.click()
    expect(page.get_by_role("dialog", name="Picture")).to_be_visible()
    assert page.evaluate(width) <= 0
    assert page.locator("#viewer").evaluate("box => box.scrollWidth - box.clientWidth") <= 0
