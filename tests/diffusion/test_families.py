"""Every family's pixels against stock diffusers': small models of the same classes, same seed, CPU, float32."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import ModelError, RequestError
from diffusion.families import ARCHITECTURES, family_of
from diffusion.recipe import Recipe
from diffusion.refresh import stage
from tests.diffusion.support import build, generators, pixels, read_configs, read_tensors
from tests.support.small_families import (
    stock_pipeline,
    write_small_sd3,
    write_small_sd_turbo,
)

PROMPT = "a golden fox over the castle, night"
REQUEST = GenerationRequest(prompt=PROMPT, width=64, height=96, seed=11, steps=2)


def sd3_5_medium(folder: Path) -> Path:
    return write_small_sd3(folder, is_3_5_medium=True)


def sd3_without_t5(folder: Path) -> Path:
    return write_small_sd3(folder, with_t5=False)


WRITERS = [write_small_sd_turbo, write_small_sd3, sd3_5_medium, sd3_without_t5]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda writer: writer.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return stock_pipeline(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    recipe = Recipe.from_configs(read_configs(folder))
    return Engine(build(folder, recipe), recipe)


def one(engine: Engine, **changes: Any) -> np.ndarray:
    (generated,) = engine.generate(dataclasses.replace(REQUEST, **changes))
    return pixels(generated.image)


def stocks(stock: Any, **call: Any) -> np.ndarray:
    (generator,) = generators(11)
    defaults = {"prompt": PROMPT, "width": 64, "height": 96, "num_inference_steps": 2}
    return pixels(stock(**defaults | call, generator=generator).images[0])


def test_every_pixel_is_stocks_as_its_pipeline_runs_when_nobody_says_how(engine, stock):
    np.testing.assert_array_equal(one(engine), stocks(stock))


@pytest.mark.parametrize("prompt", ["many words " * 200, "red"])
def test_a_long_prompt_is_cut_where_stock_cuts_it_or_is_read_in_full(engine, stock, prompt):
    ours, theirs = one(engine, prompt=prompt), stocks(stock, prompt=prompt)

    in_full = engine.recipe.architecture.attends_to is not None and prompt != "red"
    assert np.array_equal(ours, theirs) != in_full


@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(0.0, ""), (4.0, "ugly, blurry")])
def test_guidance_and_what_to_avoid_are_stocks(engine, stock, guidance_scale, negative_prompt):
    call = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}

    np.testing.assert_array_equal(one(engine, **call), stocks(stock, **call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_is_the_one_stock_diffusers_loads(folder, dtype):
    recipe = Recipe.from_configs(read_configs(folder))
    ours = build(folder, recipe, dtype=dtype)
    theirs = stock_pipeline(folder, dtype=dtype)

    for name in recipe.architecture.modules:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(other)
        if mine is None:
            continue
        states = [
            dict(module.named_parameters()) | dict(module.named_buffers())
            for module in (mine, other)
        ]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            assert tensor.dtype == states[1][key].dtype, f"{name}: {key}"
            assert torch.equal(tensor, states[1][key]), f"{name}: {key}"


def test_a_new_version_takes_over_and_its_pixels_are_stocks(folder, engine, stock):
    recipe = engine.recipe
    configs = read_configs(folder)
    other = Engine(build(folder, recipe), recipe, "old")
    with torch.no_grad():
        for parameter in other._pipeline.components[
            other.recipe.architecture.denoiser
        ].parameters():
            parameter.zero_()

    other.replace(stage(configs, read_tensors(folder), recipe, "new"))

    assert other.version == "new"
    np.testing.assert_array_equal(one(other), stocks(stock))


def test_a_size_between_its_steps_is_refused_by_name(engine):
    with pytest.raises(RequestError, match="width is 72 pixels; this model makes multiples of 16"):
        engine.generate(dataclasses.replace(REQUEST, width=72))


def test_a_transformer_makes_nothing_larger_than_its_table_of_positions(tmp_path):
    recipe = Recipe.from_configs(read_configs(write_small_sd3(tmp_path, with_t5=False)))
    engine = Engine(build(tmp_path, recipe.model_copy(update={"native_size": 128})), recipe)

    with pytest.raises(RequestError, match="height is 208 pixels; this model makes 1 to"):
        engine.generate(dataclasses.replace(REQUEST, height=208))


def test_an_unsupported_part_is_refused_by_name(folder):
    configs = read_configs(folder)
    recipe = Recipe.from_configs(configs)
    index = configs["model_index.json"].replace(b'"AutoencoderKL"', b'"AutoencoderTiny"')

    with pytest.raises(ModelError, match=r"asks for vae to be .*only AutoencoderKL is supported"):
        build(folder, recipe, configs=configs | {"model_index.json": index})


def test_a_recipe_for_another_pipeline_is_refused(folder):
    configs = read_configs(folder)
    recipe = Recipe.from_configs(configs)
    another = next(name for name in ARCHITECTURES if name != recipe.pipeline)

    with pytest.raises(ModelError, match=f"recipe is for a {another}"):
        build(folder, recipe.model_copy(update={"pipeline": another}))


@pytest.mark.parametrize(
    ("repo", "steps", "guidance_scale"),
    [
        ("stabilityai/sdxl-turbo", 1, 0.0),
        ("StabilityAI/SD-Turbo", 1, 0.0),
        ("stabilityai/stable-diffusion-3.5-large", 28, 3.5),
        ("stabilityai/stable-diffusion-3.5-large-turbo", 4, 0.0),
        ("stabilityai/stable-diffusion-3.5-medium", 40, 4.5),
    ],
)
def test_a_known_checkpoint_runs_as_its_authors_run_it(repo, steps, guidance_scale):
    family = family_of(repo)
    assert family is not None
    plain = Recipe.model_validate(
        {
            "pipeline": family.pipeline,
            "scheduler": {"class_name": "EulerDiscreteScheduler"},
            "dtype": "float16",
            "native_size": 512,
        }
    )

    recipe = plain.as_family(family)

    assert (recipe.default_steps, recipe.guidance_scale) == (steps, guidance_scale)
    assert recipe.guidance_free == (guidance_scale == 0)


def test_every_family_names_a_pipeline_that_can_be_built():
    for architecture in ARCHITECTURES.values():
        assert architecture.denoiser in architecture.modules
        assert {tokenizer.encoder for tokenizer in architecture.tokenizers.values()} <= set(
            architecture.modules
        )
        assert architecture.optional <= set(architecture.components)
