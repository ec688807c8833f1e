"""Fused projections and 8-bit layers: the same products, by another way."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.engine import Engine, GenerationRequest
from diffusion.float8 import Float8Layers
from diffusion.fused import Joined, fuse_projections
from diffusion.refresh import stage
from diffusion.speed import Speed
from tests.diffusion.support import LIGHTNING, build, pixels, read_configs, read_tensors
from tests.support.small_families import write_small_sd3

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=1, seed=3)


def image(engine: Engine) -> np.ndarray:
    (made,) = engine.generate(REQUEST)
    return pixels(made.image)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one - other) ** 2.0)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def test_fused_projections_give_the_same_image_from_the_same_memory(model):
    plain = build(model)
    fused = build(model)
    keys = list(fused.unet.state_dict())

    count = fuse_projections(fused.unet)

    # Two in every block: self-attention and cross-attention.
    blocks = [name for name, _ in fused.unet.named_modules() if name.endswith(".attn1")]
    assert count == 2 * len(blocks) > 0
    assert list(fused.unet.state_dict()) == keys
    for name, tensor in plain.unet.state_dict().items():
        assert torch.equal(fused.unet.state_dict()[name], tensor), name
    attention = fused.unet.get_submodule(blocks[0])
    assert attention.to_k.weight.untyped_storage().data_ptr() == (
        attention.to_qkv.weight.untyped_storage().data_ptr()
    )
    assert psnr(image(Engine(fused, LIGHTNING)), image(Engine(plain, LIGHTNING))) >= 60


def test_a_new_version_reaches_the_fused_weights(model, half_model):
    fused = build(model)
    fuse_projections(fused.unet)
    engine = Engine(fused, LIGHTNING)

    engine.replace(stage(read_configs(half_model), read_tensors(half_model), LIGHTNING))

    assert psnr(image(engine), image(Engine(build(half_model), LIGHTNING))) >= 60


def test_attention_of_another_kind_is_left_alone(tmp_path):
    from diffusers import SD3Transformer2DModel

    write_small_sd3(tmp_path)
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")

    assert fuse_projections(transformer) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_layers_in_8_bits_give_nearly_the_same_image_and_can_be_switched_off(model, fused):
    pipeline = build(model)
    if fused:
        fuse_projections(pipeline.unet)
    engine = Engine(pipeline, LIGHTNING, batch_size=1)
    before = image(engine)
    layers = Float8Layers(pipeline.unet, smallest_side=32)
    assert len(layers) > 10

    layers.switch(on=True)
    rounded = image(engine)
    layers.switch(on=False)

    assert not np.array_equal(rounded, before)
    # The model is untrained and has no margin; images of two seeds are 8 dB apart.
    assert psnr(rounded, before) >= 20
    np.testing.assert_array_equal(image(engine), before)


def test_every_fused_layer_is_taken_once(model):
    pipeline = build(model)
    separate = len(Float8Layers(pipeline.unet, smallest_side=32))
    fuse_projections(pipeline.unet)

    blocks = sum(name.endswith(".attn1") for name, _ in pipeline.unet.named_modules())
    assert len(Float8Layers(pipeline.unet, smallest_side=32)) == separate - 3 * blocks


def test_layers_in_8_bits_follow_a_new_version(model, half_model):
    pipeline = build(model)
    layers = Float8Layers(pipeline.unet, smallest_side=32)
    layers.switch(on=True)
    engine = Engine(pipeline, LIGHTNING, batch_size=1)
    fresh = build(half_model)
    Float8Layers(fresh.unet, smallest_side=32).switch(on=True)

    engine.replace(stage(read_configs(half_model), read_tensors(half_model), LIGHTNING))
    layers.refresh()

    np.testing.assert_array_equal(image(engine), image(Engine(fresh, LIGHTNING, batch_size=1)))


def test_a_layer_in_8_bits_is_as_near_as_8_bits_can_be():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(128, 96)
    inputs = torch.randn(2, 7, 128, generator=generator)
    inputs[0, 0, 0] = 1000.0  # in one row, which takes nothing from the others
    module = torch.nn.ModuleDict({"transformer_blocks": torch.nn.Sequential(layer)})
    expected = layer(inputs)

    Float8Layers(module, smallest_side=32).switch(on=True)
    found = layer(inputs)

    assert found.shape == expected.shape
    difference = (found - expected)[1].abs().max() / expected[1].abs().max()
    assert difference < 0.06


def test_joined_layers_with_biases_are_their_parts_side_by_side():
    parts = [torch.nn.Linear(16, 8), torch.nn.Linear(16, 24)]
    inputs = torch.randn(3, 16)
    expected = torch.cat([part(inputs) for part in parts], dim=-1)

    joined = Joined(parts)

    torch.testing.assert_close(joined(inputs), expected)
    with torch.no_grad():
        parts[1].bias.zero_()
    assert not torch.equal(joined(inputs), expected)


@pytest.fixture
def float8(model) -> tuple[Speed, Engine]:
    """An engine on the CPU whose layers are about to be tried; a card is what switches them on by itself."""
    pipeline = build(model)
    speed = Speed(torch.device("cpu"))
    speed._layers = Float8Layers(pipeline.unet, smallest_side=32)
    return speed, Engine(pipeline, LIGHTNING, batch_size=1)


def generate(engine: Engine) -> Image.Image:
    (made,) = engine.generate(REQUEST)
    return made.image


def test_8_bit_floats_stay_where_images_stay_near(float8, monkeypatch, caplog):
    speed, engine = float8
    before = image(engine)
    monkeypatch.setattr("diffusion.speed.LOWEST_FLOAT8_DECIBELS", 20.0)

    with caplog.at_level(logging.INFO, logger="diffusion"):
        decibels = speed.try_float8(partial(generate, engine))

    assert decibels is not None
    assert decibels >= 20
    assert not np.array_equal(image(engine), before)
    assert f"8-bit floats: {decibels:.1f} dB" in caplog.text


def test_8_bit_floats_that_can_be_seen_are_off_with_a_line(float8, monkeypatch, caplog):
    speed, engine = float8
    before = image(engine)
    monkeypatch.setattr("diffusion.speed.LOWEST_FLOAT8_DECIBELS", 99.0)

    speed.try_float8(partial(generate, engine))

    np.testing.assert_array_equal(image(engine), before)
    assert "below 99 it stays off" in caplog.text


def test_8_bit_floats_that_a_card_refuses_are_off_with_a_line(float8, monkeypatch, caplog):
    speed, engine = float8
    before = image(engine)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("rowwise scaling wants bfloat16\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_mm", refuse)
        assert speed.try_float8(partial(generate, engine)) is None

    np.testing.assert_array_equal(image(engine), before)
    assert "it failed with this card and dtype (rowwise scaling wants bfloat16)" in caplog.text


def test_a_card_that_cannot_is_said_and_nothing_is_tried(caplog):
    speed = Speed(torch.device("cpu"), float8=True)

    assert speed.try_float8(lambda: pytest.fail("an image was asked for")) is None
    assert "does not compute 8-bit floats" in caplog.text
