"""Keys and values of a prompt, made once for an image: the same numbers, asked for less often."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from diffusion.denoising import Denoising
from diffusion.engine import Engine
from diffusion.fused import fuse_projections
from diffusion.prompt_keys import make_keys_once, prepared
from diffusion.prompts import Prompts
from diffusion.recipe import SDXL, Recipe
from diffusion.refresh import stage
from diffusion.request import GenerationRequest, Plan
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    build,
    pixels,
    read_configs,
    read_tensors,
    stock_pipeline,
)
from tests.support.small_families import write_small_sd3

TOKENS = 77
PLAN = Plan("a small red boat", None, 64, 64, steps=2, guidance_scale=0.0, seeds=(3,))


def image(engine: Engine, steps: int = 1) -> np.ndarray:
    request = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=steps, seed=3)
    (made,) = engine.generate(request)
    return pixels(made.image)


def asked(unet: UNet2DConditionModel, rows: int = 1) -> dict[str, Any]:
    """The arguments of a pass."""
    config = unet.config
    generator = torch.Generator().manual_seed(1)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    return {
        "sample": noise(config.in_channels, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": noise(TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": noise(pooled),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * rows),
        },
    }


def makers(unet: UNet2DConditionModel) -> list[str]:
    """The layers that make keys and values of prompts."""
    return [
        name for name, _ in unet.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))
    ]


@contextmanager
def counted(unet: UNet2DConditionModel) -> Iterator[list[str]]:
    """Those of them that were called, each time that one was."""
    called: list[str] = []
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in makers(unet)
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def unet(model) -> UNet2DConditionModel:
    return build(model).unet


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rows", [1, 2])
def test_a_pass_gives_the_same_bits_for_a_prompt_and_for_its_keys(unet, rows):
    arguments = asked(unet, rows)
    stocks = unet(**arguments).sample
    names = list(unet.state_dict())

    count = make_keys_once(unet, joined=False)

    assert 2 * count == len(makers(unet)) > 0
    assert list(unet.state_dict()) == names
    keys = prepared(unet, arguments["encoder_hidden_states"])
    width = sum(unet.get_submodule(name).out_features for name in makers(unet))
    assert keys.shape == (rows, TOKENS, width)
    assert torch.equal(unet(**arguments).sample, stocks)
    with counted(unet) as called:
        assert torch.equal(unet(**arguments | {"encoder_hidden_states": keys}).sample, stocks)
    assert called == []


def test_as_one_product_the_numbers_are_the_same_but_for_their_last_bits(unet):
    arguments = asked(unet)
    stocks = unet(**arguments).sample
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    assert make_keys_once(unet, joined=True) > 0

    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    keys = prepared(unet, arguments["encoder_hidden_states"])
    found = unet(**arguments | {"encoder_hidden_states": keys}).sample
    torch.testing.assert_close(found, stocks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [LIGHTNING, GUIDED], ids=["unguided", "guided"])
def test_an_image_of_several_steps_has_them_made_once(model, recipe: Recipe):
    pipeline = build(model, recipe)
    engine = Engine(pipeline, recipe)

    with counted(pipeline.unet) as called:
        image(engine, steps=2)

    assert sorted(called) == sorted(makers(pipeline.unet))


def test_in_company_it_takes_its_prompt_and_holds_nothing_else(model):
    pipeline, cpu = build(model), torch.device("cpu")
    make_keys_once(pipeline.unet, joined=False)
    embeddings = Prompts(pipeline, SDXL, cpu).encode(PLAN)
    denoising = Denoising(pipeline, SDXL, PLAN, 3, embeddings, cpu)
    keys = denoising.inputs()["prompt"]
    held = weakref.ref(keys)

    assert denoising.inputs()["prompt"] is keys
    assert torch.equal(keys, prepared(pipeline.unet, embeddings["prompt_embeds"]))
    del keys

    assert denoising.inputs(in_company=True)["prompt"] is embeddings["prompt_embeds"]
    assert held() is None


@pytest.mark.parametrize("joined", [False, True])
def test_a_new_version_reaches_what_makes_them(model, update, joined):
    pipeline = build(model)
    assert make_keys_once(pipeline.unet, joined=joined) > 0
    fuse_projections(pipeline.unet)  # as on a card
    engine = Engine(pipeline, LIGHTNING)
    before = image(engine)

    engine.replace(stage(read_configs(update), read_tensors(update), LIGHTNING))

    after, wanted = image(engine).astype(int), image(Engine(build(update), LIGHTNING)).astype(int)
    assert np.abs(after - wanted).max() <= 1 < np.abs(after - before).max()


def test_stocks_pipeline_still_gives_it_a_prompt(model):
    ours, stock = build(model), stock_pipeline(model)
    make_keys_once(ours.unet, joined=False)

    def made(pipeline: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        pipeline.set_progress_bar_config(disable=True)
        arguments = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 64, "width": 64}
        return pixels(pipeline("a boat", generator=generator, **arguments).images[0])

    assert np.array_equal(made(ours), made(stock))


def test_it_is_done_once(unet):
    prompt = asked(unet)["encoder_hidden_states"]
    assert make_keys_once(unet, joined=False) > 0
    keys = prepared(unet, prompt)

    assert make_keys_once(unet, joined=True) == 0

    assert torch.equal(prepared(unet, prompt), keys)


def test_a_denoiser_of_another_kind_takes_its_prompt(tmp_path):
    write_small_sd3(tmp_path)
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    prompt = torch.zeros(1, TOKENS, 32)

    assert make_keys_once(transformer, joined=False) == 0
    assert prepared(transformer, prompt) is prompt


def _attention_of_another_kind(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    next(part for name, part in unet.named_modules() if name.endswith("attn2")).set_processor(
        AttnProcessor()
    )


def _a_prompt_that_is_projected_first(unet: Any) -> None:
    unet.encoder_hid_proj = torch.nn.Linear(2, 2)


def _a_prompt_that_time_is_told_of(unet: Any) -> None:
    unet.register_to_config(addition_embed_type="text")


def _attention_whose_prompts_are_normed(unet: Any) -> None:
    next(
        part for name, part in unet.named_modules() if name.endswith("attn2")
    ).norm_cross = torch.nn.LayerNorm(2)


def _a_reader_that_is_in_no_block(unet: Any) -> None:
    from diffusers.models.attention_processor import Attention

    unet.another = Attention(8, cross_attention_dim=unet.config.cross_attention_dim)


@pytest.mark.parametrize(
    "change",
    [
        _attention_of_another_kind,
        _a_prompt_that_is_projected_first,
        _a_prompt_that_time_is_told_of,
        _attention_whose_prompts_are_normed,
        _a_reader_that_is_in_no_block,
    ],
)
def test_who_does_more_with_a_prompt_is_left_as_it_is(unet, change):
    change(unet)
    prompt = torch.zeros(1, TOKENS, 8)

    assert make_keys_once(unet, joined=False) == 0
    assert prepared(unet, prompt) is prompt
