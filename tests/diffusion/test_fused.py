"""Fused projections and 8-bit layers: the same products, by another way."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from torch.nn import functional

from diffusion import fused
from diffusion.engine import Engine, GenerationRequest
from diffusion.float8 import Float8Layers, rounded_bytes
from diffusion.fused import Joined, fuse_projections
from diffusion.refresh import stage
from diffusion.speed import Speed
from diffusion.upsampling import SubPixelUpsample
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
    blocks = sum(name.endswith(".attn1") for name, _ in pipeline.unet.named_modules())
    assert (
        len(layers) == (3 if fused else 2) * blocks
    )  # the feed-forward's two, and query, key and value as one

    layers.switch(on=True)
    rounded = image(engine)
    layers.switch(on=False)

    assert not np.array_equal(rounded, before)
    # The model is untrained and has no margin; images of two seeds are 8 dB apart.
    assert psnr(rounded, before) >= 20
    np.testing.assert_array_equal(image(engine), before)


def test_layers_that_read_the_prompt_or_are_square_are_left_as_they_are(model):
    pipeline = build(model)
    fuse_projections(pipeline.unet)

    Float8Layers(pipeline.unet, smallest_side=32).switch(on=True)

    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            assert module.to_kv.product is functional.linear
            assert "forward" not in module.to_q.__dict__
            assert "forward" not in module.to_out[0].__dict__


def test_rounded_copies_are_counted_before_anything_is_fused(model, monkeypatch):
    monkeypatch.setattr("diffusion.float8.SMALLEST_SIDE", 32)
    pipeline = build(model)
    before = rounded_bytes(pipeline.unet)
    fuse_projections(pipeline.unet)

    layers = Float8Layers(pipeline.unet, smallest_side=32)

    assert before == rounded_bytes(pipeline.unet)
    assert before == sum(layer.rounded.nbytes for layer in layers._layers)


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
    layer = torch.nn.Linear(128, 64)
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


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, AssertionError])
def test_8_bit_floats_that_a_card_refuses_are_off_with_a_line(float8, monkeypatch, caplog, kind):
    speed, engine = float8
    before = image(engine)

    def refuse(*_: object, **__: object) -> None:
        raise kind("rowwise scaling wants bfloat16\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_scaled_mm", refuse)
        assert speed.try_float8(partial(generate, engine)) is None

    np.testing.assert_array_equal(image(engine), before)
    assert "it failed with this card and dtype (rowwise scaling wants bfloat16)" in caplog.text


def test_a_card_that_cannot_is_said_and_nothing_is_tried(caplog):
    speed = Speed(torch.device("cpu"), float8=True)

    assert speed.try_float8(lambda: pytest.fail("an image was asked for")) is None
    assert "does not compute 8-bit floats" in caplog.text


# What a card is given, where its work is done by the CPU: only the steps of `Speed` are looked at


@pytest.fixture
def speed(monkeypatch) -> Speed:
    monkeypatch.setattr("diffusion.speed.computes_float8", lambda _: True)
    monkeypatch.setattr("diffusion.speed.Float8Layers", partial(Float8Layers, smallest_side=32))
    monkeypatch.setattr("diffusion.speed.LOWEST_FLOAT8_DECIBELS", 20.0)
    return Speed(torch.device("cuda"), float8=True)


def in_8_bits(denoiser: torch.nn.Module) -> bool:
    """Whether any layer is; where one is that should not be, a test of pixels says it too."""
    return any(
        "forward" in module.__dict__
        or any(
            isinstance(joined, Joined) and joined.product is not functional.linear
            for joined in module.__dict__.values()
        )
        for module in denoiser.modules()
    )


def prepared(speed: Speed, folder) -> Engine:
    pipeline = build(folder)
    speed.prepare(pipeline.unet, pipeline.vae)
    return Engine(pipeline, LIGHTNING, batch_size=1)


def test_a_denoiser_that_follows_one_in_8_bits_is_in_8_bits_too(model, half_model, speed):
    first = prepared(speed, model)
    assert speed.try_float8(partial(generate, first)) is not None

    second = prepared(speed, half_model)

    rounded, plain = image(second), image(Engine(build(half_model), LIGHTNING, batch_size=1))
    assert in_8_bits(second._pipeline.unet)
    assert 20 <= psnr(rounded, plain) < 60
    # And the first one's layers are let go, with the copies that they would hold.
    assert not in_8_bits(first._pipeline.unet)


def test_8_bit_floats_that_were_refused_are_not_built_again(model, half_model, speed, monkeypatch):
    monkeypatch.setattr("diffusion.speed.LOWEST_FLOAT8_DECIBELS", 99.0)
    first = prepared(speed, model)
    assert speed.try_float8(partial(generate, first)) is not None

    second = prepared(speed, half_model)

    assert speed.try_float8(lambda: pytest.fail("an image was asked for")) is None
    assert not in_8_bits(second._pipeline.unet)


def test_an_image_that_cannot_be_made_ends_8_bit_floats_and_nothing_else(model, speed, caplog):
    engine = prepared(speed, model)

    def fail() -> Image.Image:
        raise MemoryError

    assert speed.try_float8(fail) is None

    assert not in_8_bits(engine._pipeline.unet)
    assert "stays off: it failed with this card and dtype (MemoryError)" in caplog.text


@pytest.mark.parametrize(
    ("failing_at", "left_out"),
    [(1, "Keys of prompts"), (2, "Fused projections"), (5, "Fused projections")],
)
def test_projections_fused_halfway_give_the_same_image(
    model, speed, monkeypatch, caplog, failing_at, left_out
):
    calls = 0

    def full(parts: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return joined(parts)

    joined = fused._joined
    monkeypatch.setattr(fused, "_joined", full)
    monkeypatch.setattr(speed, "_wants_float8", False)

    engine = prepared(speed, model)

    (line,) = caplog.messages
    assert line.startswith(f"{left_out}: left out")
    assert calls >= failing_at
    assert psnr(image(engine), image(Engine(build(model), LIGHTNING))) >= 60
    # In 8 bits too, every layer is still taken once.
    Float8Layers(engine._pipeline.unet, smallest_side=32).switch(on=True)
    assert 20 <= psnr(image(engine), image(Engine(build(model), LIGHTNING))) < 60


def test_layers_that_have_no_room_for_8_bits_stay_as_they_are(model, speed, monkeypatch, caplog):
    def full(rows: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr("diffusion.float8._in_8_bits", full)

    engine = prepared(speed, model)

    assert caplog.messages == [
        "FLOAT8: left out, and images take longer. It failed here (CUDA out of memory)."
    ]
    assert speed.try_float8(lambda: pytest.fail("an image was asked for")) is None
    assert psnr(image(engine), image(Engine(build(model), LIGHTNING))) >= 60


def test_new_weights_that_cannot_be_rounded_end_8_bit_floats(model, speed, monkeypatch):
    engine = prepared(speed, model)
    pipeline = engine._pipeline
    assert speed.try_float8(partial(generate, engine)) is not None
    speed.prepare(pipeline.unet, pipeline.vae)
    assert in_8_bits(pipeline.unet)

    def full(rows: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusion.float8._in_8_bits", full)
    speed.prepare(pipeline.unet, pipeline.vae)

    assert psnr(image(engine), image(Engine(build(model), LIGHTNING))) >= 60


def test_graphs_are_forgotten_when_passes_compute_in_another_way(model, speed, monkeypatch):
    in_8_bits_when_forgotten: list[bool] = []
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING, batch_size=1)
    monkeypatch.setattr(
        speed, "_forget_graphs", lambda: in_8_bits_when_forgotten.append(in_8_bits(pipeline.unet))
    )
    speed.prepare(pipeline.unet, pipeline.vae)
    assert in_8_bits_when_forgotten == []

    speed.try_float8(partial(generate, engine))
    speed.prepare(pipeline.unet, pipeline.vae)
    assert in_8_bits_when_forgotten == [True]  # and not when weights only were rounded anew

    monkeypatch.setattr("diffusion.float8._in_8_bits", lambda rows: 1 / 0)
    speed.prepare(pipeline.unet, pipeline.vae)
    assert in_8_bits_when_forgotten == [True, False]


@pytest.mark.parametrize("has_room", [True, False])
def test_new_weights_reach_upsampling_or_it_is_stocks_again(
    model, update, speed, monkeypatch, caplog, has_room
):
    forgotten: list[bool] = []
    engine, other = prepared(speed, model), build(update)
    pipeline = engine._pipeline
    monkeypatch.setattr(speed, "_forget_graphs", lambda: forgotten.append(True))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).load_state_dict(getattr(other, part).state_dict())

    def full(weight: object, kernels: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if not has_room:
        monkeypatch.setattr("diffusion.upsampling._sum", full)
    speed.prepare(pipeline.unet, pipeline.vae)

    kinds = {type(part) for part in pipeline.vae.decoder.modules()}
    assert (SubPixelUpsample in kinds) is has_room
    assert (Upsample2D in kinds) is not has_room
    assert psnr(image(engine), image(Engine(build(update), LIGHTNING))) >= 60
    # What was recorded reads kernels that nobody brings up to date any more.
    assert forgotten == ([] if has_room else [True])
    assert ("Upsampling: left out" in caplog.text) is not has_room
