"""What callers may ask for: every refusal names the field and what it may hold."""

import dataclasses
import logging

import pytest

from diffusion.errors import RequestError
from diffusion.recipe import Recipe, SchedulerRecipe, lightning_recipe
from diffusion.request import GenerationRequest, plan

ANY = Recipe(
    scheduler=SchedulerRecipe(class_name="EulerDiscreteScheduler"),
    dtype="float16",
    native_size=1024,
)
REQUEST = GenerationRequest(prompt="a lighthouse", width=1024, height=1024)


def planned(recipe: Recipe = ANY, **changes: object):
    return plan(dataclasses.replace(REQUEST, **changes), recipe, size_multiple=32)


def test_what_is_left_open_comes_from_the_recipe():
    assert planned().steps == 50
    assert planned().guidance_scale == 5.0
    assert planned(lightning_recipe(8)).steps == 8
    assert planned(lightning_recipe(8)).guidance_scale == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": "a" * 10_000_000}, r"prompt has 10,000,000 characters; 10,000"),
        ({"negative_prompt": "a" * 10_001}, "negative_prompt has 10,001 characters"),
        ({"prompt": "a\0b"}, "prompt contains a NUL character"),
        ({"width": 0}, "width is 0"),
        ({"height": -64}, "height is -64"),
        ({"width": 1000}, "width is 1000 pixels; .* multiples of 32, such as 992"),
        ({"height": 4096}, "height is 4096 pixels; .* 1 to 2048"),
        ({"num_outputs": 0}, "num_outputs is 0"),
        ({"num_outputs": -1}, "num_outputs is -1"),
        ({"steps": 0}, "num_inference_steps is 0; .* 1 to 50"),
        ({"steps": 51}, "num_inference_steps is 51; .* 1 to 50"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, f"seed is {2**63}; .* 0 to {2**63 - 1}"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ],
)
def test_what_no_checkpoint_can_do_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        planned(**changes)


@pytest.mark.parametrize("steps", [1, 3, 8, 50, 0, -4])
def test_a_step_count_the_checkpoint_was_not_distilled_for_is_refused_with_those_it_can_do(steps):
    with pytest.raises(RequestError, match=rf"num_inference_steps is {steps}; .*\b4\b"):
        planned(lightning_recipe(4), steps=steps)


def test_several_step_counts_are_all_listed():
    recipe = lightning_recipe(4).model_copy(update={"steps": (8, 2, 4)})

    with pytest.raises(RequestError, match="2 or 4 or 8"):
        planned(recipe, steps=3)
    assert planned(recipe, steps=8).steps == 8


def test_image_k_has_seed_plus_k_and_the_largest_seed_is_followed_by_the_smallest():
    assert planned(seed=7, num_outputs=3).seeds == (7, 8, 9)
    assert planned(seed=2**63 - 1, num_outputs=2).seeds == (2**63 - 1, 0)


def test_seeds_left_open_are_random_over_63_bits():
    seeds = [planned().seeds[0] for _ in range(64)]

    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**56  # a 32-bit generator would never come here


def test_an_empty_negative_prompt_is_none_at_all():
    assert planned(negative_prompt="").negative_prompt is None
    assert planned(negative_prompt="  ").negative_prompt is None
    assert planned(negative_prompt="blurry").negative_prompt == "blurry"


def test_a_guidance_free_checkpoint_ignores_guidance_with_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO)

    assert planned(lightning_recipe(), guidance_scale=3.5).guidance_scale == 0.0

    (record,) = caplog.records
    assert "guidance_scale 3.5" in record.getMessage()


def test_a_guidance_free_checkpoint_ignores_a_negative_prompt_with_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO)

    assert planned(lightning_recipe(), negative_prompt="blurry").negative_prompt is None

    (record,) = caplog.records
    assert record.getMessage().startswith("Ignoring negative_prompt: ")


def test_guidance_that_changes_nothing_is_not_worth_a_line(caplog):
    caplog.set_level(logging.INFO)

    planned(lightning_recipe(), guidance_scale=0.0)
    planned(lightning_recipe(), negative_prompt=" ")
    planned(ANY, guidance_scale=3.5, negative_prompt="blurry")

    assert not caplog.records
