"""Plain prompts: what stock makes of them, how often, and what is kept."""

import numpy as np
import pytest

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import Engine
from diffusion.refresh import stage
from tests.diffusion.prompting import (
    LONG,
    PROMPT,
    Model,
    assert_equal,
    images,
)
from tests.diffusion.support import (
    GUIDED,
    build,
    generators,
    pixels,
    read_configs,
    read_tensors,
    stock_pipeline,
)

# Plain prompts


@pytest.mark.parametrize("prompt", [PROMPT, "C++ (1920) well- (red:1.3", "red " * 75])
@pytest.mark.parametrize("negative", [None, "blurry, (ugly)"])
@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_a_plain_prompt_is_to_the_bit_what_stock_makes_of_it(
    small, prompt, negative, guidance_scale
):
    ours = small.encode(prompt=prompt, negative_prompt=negative, guidance_scale=guidance_scale)

    assert_equal(ours, small.stocks(prompt, negative, guided=guidance_scale > 1))


def test_the_pixels_of_a_kept_prompt_are_those_of_a_fresh_one_and_stock_s(model):
    engine = Engine(build(model, GUIDED), GUIDED)
    call = {"negative_prompt": "blurry", "guidance_scale": 5.0}

    first, second = (images(engine, width=96, height=96, **call)[0] for _ in range(2))

    (generator,) = generators(3)
    stock = stock_pipeline(model)(
        prompt=PROMPT, width=96, height=96, num_inference_steps=2, generator=generator, **call
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, pixels(stock.images[0]))


# What is kept


def test_the_text_encoders_run_once_for_four_images_and_never_again_for_their_prompt(sdxl):
    engine = Engine(sdxl.pipeline, GUIDED)

    with sdxl.runs() as runs:
        assert len(images(engine, num_outputs=4)) == 4
    assert sorted(runs) == ["text_encoder", "text_encoder_2"]

    with sdxl.runs() as runs:
        images(engine, seed=9, width=96)
    assert runs == []


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "red"},
        {"negative_prompt": "red"},
        {"guidance_scale": 0.0},
        {"prompt_weighting": True},
    ],
)
def test_whatever_the_embeddings_depend_on_has_them_made_anew(sdxl, other):
    prompts = sdxl.prompts()
    sdxl.encode(prompts)

    with sdxl.runs() as runs:
        sdxl.encode(prompts, **other)
        again = list(runs)
        sdxl.encode(prompts, **other)
        sdxl.encode(prompts)

    assert again
    assert runs == again


def test_what_the_embeddings_do_not_depend_on_does_not(sdxl):
    prompts = sdxl.prompts()
    sdxl.encode(prompts)

    with sdxl.runs() as runs:
        sdxl.encode(prompts, width=96, steps=4, seeds=(7, 8), guidance_scale=9.0)

    assert runs == []


def test_what_was_asked_for_least_recently_makes_room(sdxl):
    size = sum(tensor.nbytes for tensor in sdxl.encode().values())
    prompts = sdxl.prompts(max_bytes=2 * size)
    for prompt in ("red", "green", "red", "blue"):
        sdxl.encode(prompts, prompt=prompt)

    assert prompts.kept_bytes == 2 * size
    with sdxl.runs() as runs:
        sdxl.encode(prompts, prompt="red")
        sdxl.encode(prompts, prompt="blue")
        assert runs == []
        sdxl.encode(prompts, prompt="green")
        assert len(runs) == 2
    assert prompts.kept_bytes == 2 * size


def test_what_is_larger_than_all_the_room_makes_none(sdxl):
    size = sum(tensor.nbytes for tensor in sdxl.encode().values())
    prompts = sdxl.prompts(max_bytes=size)
    sdxl.encode(prompts)

    sdxl.encode(prompts, prompt=LONG)

    with sdxl.runs() as runs:
        sdxl.encode(prompts)
    assert runs == []
    assert prompts.kept_bytes == size


def test_a_version_that_takes_over_finds_nothing_of_the_old_one(model, tmp_path):
    update = write_small_sdxl(tmp_path, seed=1)
    # Both without a name, which tells nothing apart.
    engine, other = (Engine(build(folder, GUIDED), GUIDED) for folder in (model, update))
    images(engine)
    images(engine, prompt=LONG, prompt_weighting=True)
    staged = stage(read_configs(update), read_tensors(update), GUIDED, None)

    engine.replace(staged)

    assert engine._model(None).prompts.kept_bytes == 0
    for asked in ({}, {"prompt": LONG, "prompt_weighting": True}):
        for mine, theirs in zip(images(engine, **asked), images(other, **asked), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_each_of_the_models_that_share_modules_finds_its_own(model, tmp_path):
    other = write_small_sdxl(tmp_path, seed=1)
    engine = Engine(build(model, GUIDED), GUIDED, name="one")
    engine.add_model("two", stage(read_configs(other), read_tensors(other), GUIDED, None))
    alone = {
        "one": images(Engine(build(model, GUIDED), GUIDED)),
        "two": images(Engine(build(other, GUIDED), GUIDED)),
    }

    small = Model(model, GUIDED, engine._model("one").pipeline)
    with small.runs() as runs:
        made = [(name, images(engine, model=name)) for name in ("one", "two", "one", "two")]

    assert sorted(runs) == ["text_encoder", "text_encoder", "text_encoder_2", "text_encoder_2"]
    for name, (image,) in made:
        np.testing.assert_array_equal(image, alone[name][0])
