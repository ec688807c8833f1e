"""The engine's pixels against stock diffusers': same model, same seed, CPU, float32.

Stock is called once per image. In a batch its own pixels differ in places by one level of 255, because CPU kernels
choose their order of summation by shape; so one test against the batched call allows exactly that.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline

from diffusion.engine import Engine, GenerationRequest
from diffusion.recipe import Recipe, SchedulerRecipe
from tests.diffusion.support import (
    GUIDED,
    build_engine,
    generators,
    pixels,
    read_configs,
    stock_pipeline,
)

PROMPT = "a golden fox over the space needle, night"
REQUEST = GenerationRequest(prompt=PROMPT, width=96, height=96, seed=11)


def one(engine: Engine, **changes: object) -> np.ndarray:
    (generated,) = engine.generate(dataclasses.replace(REQUEST, **changes))
    return pixels(generated.image)


def stocks(stock: StableDiffusionXLPipeline, seed: int = 11, **call: object) -> np.ndarray:
    defaults = {"prompt": PROMPT, "width": 96, "height": 96, "guidance_scale": 0.0}
    (generator,) = generators(seed)
    return pixels(stock(**defaults | call, generator=generator).images[0])


@pytest.mark.parametrize(
    ("prompt", "size", "steps"),
    [
        (PROMPT, (96, 96), 4),
        ("red castle", (128, 96), 2),
        ("a cat — 猫, ünïcödé 🙂", (64, 160), 1),
        ("red castle " * 37, (96, 64), 4),
    ],
)
def test_without_guidance_every_pixel_is_stocks(lightning, stock, prompt, size, steps):
    width, height = size

    ours = one(lightning, prompt=prompt, width=width, height=height, steps=steps)

    assert ours.shape == (height, width, 3)
    call = {"prompt": prompt, "width": width, "height": height, "num_inference_steps": steps}
    np.testing.assert_array_equal(ours, stocks(stock, **call))


@pytest.mark.parametrize(
    ("guidance_scale", "negative_prompt"),
    [(5.0, ""), (5.0, "blurry, low quality"), (7.5, "green"), (1.0, "green"), (0.0, "")],
)
def test_with_guidance_every_pixel_is_stocks(guided, stock, guidance_scale, negative_prompt):
    ours = one(
        guided, guidance_scale=guidance_scale, negative_prompt=negative_prompt, steps=3, width=128
    )

    theirs = stocks(
        stock,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt or None,
        num_inference_steps=3,
        width=128,
    )
    np.testing.assert_array_equal(ours, theirs)


def test_guidance_and_the_negative_prompt_make_a_difference(guided):
    # Or the tests above would hold for an engine that drops them.
    plain = one(guided, guidance_scale=5.0)

    assert (plain != one(guided, guidance_scale=9.0)).any()
    assert (plain != one(guided, guidance_scale=5.0, negative_prompt="golden fox")).any()


def test_a_mirrored_model_is_run_by_its_own_scheduler_config(model, stock):
    engine = build_engine(model, Recipe.from_configs(read_configs(model)))

    ours = one(engine, steps=3, guidance_scale=0.0)

    theirs = stocks(stock_pipeline(model, trailing=False), num_inference_steps=3)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != stocks(stock, num_inference_steps=3)).any(), "leading and trailing differ"


@pytest.mark.parametrize("count", [2, 3])
def test_image_k_is_bit_for_bit_the_image_its_seed_gives_alone(guided, count):
    several = list(
        guided.generate(dataclasses.replace(REQUEST, seed=40, steps=2, num_outputs=count))
    )

    assert [generated.seed for generated in several] == list(range(40, 40 + count))
    for generated in several:
        alone = one(guided, seed=generated.seed, steps=2)
        np.testing.assert_array_equal(pixels(generated.image), alone)


@pytest.mark.parametrize("count", [2, 4])
def test_several_images_are_those_of_one_batched_stock_call(lightning, stock, count):
    seeds = range(20, 20 + count)

    ours = lightning.generate(dataclasses.replace(REQUEST, seed=20, steps=4, num_outputs=count))

    batch = stock(
        prompt=PROMPT,
        width=96,
        height=96,
        guidance_scale=0.0,
        num_inference_steps=4,
        num_images_per_prompt=count,
        generator=generators(*seeds),
    ).images
    for generated, theirs in zip(ours, batch, strict=True):
        assert np.abs(pixels(generated.image) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize(
    "scheduler", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"]
)
def test_other_schedulers_are_stocks_too_and_remember_nothing_between_images(model, scheduler):
    import diffusers

    recipe = GUIDED.model_copy(update={"scheduler": SchedulerRecipe(class_name=scheduler)})
    engine = build_engine(model, recipe)
    stock = stock_pipeline(model, trailing=False)
    stock.scheduler = getattr(diffusers, scheduler).from_config(stock.scheduler.config)

    first, second = (one(engine, steps=4, guidance_scale=0.0) for _ in range(2))

    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, stocks(stock, num_inference_steps=4))


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_any_seed_of_63_bits_is_the_one_stock_takes(lightning, stock, seed):
    # torch's CPU generator reads only the low 32 bits; an image can still be made again anywhere from its seed.
    ours = one(lightning, seed=seed, steps=1)

    np.testing.assert_array_equal(ours, stocks(stock, seed, num_inference_steps=1))


def test_half_precision_files_give_what_stock_makes_of_them(half_model: Path):
    engine = build_engine(half_model)

    ours = one(engine, steps=2)

    np.testing.assert_array_equal(ours, stocks(stock_pipeline(half_model), num_inference_steps=2))
