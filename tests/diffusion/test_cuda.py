"""What only a card can show. Skipped without one."""

import dataclasses

import numpy as np
import pytest
import torch

from diffusion.compiled import Compiling, tally
from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import OutOfMemoryError
from diffusion.float8 import computes_float8
from diffusion.recipe import SDXL
from diffusion.refresh import stage
from diffusion.request import Plan
from diffusion.sizes import ASPECT_RATIOS, size_for
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    build,
    generators,
    pixels,
    read_configs,
    read_tensors,
    stock_pipeline,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

REQUEST = GenerationRequest(prompt="a small red boat", width=256, height=256, seed=3)
MIB = 2**20


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one - other) ** 2.0)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_tensor_lands_on_the_card_in_its_dtype(model, dtype):
    pipeline = build(model, dtype=dtype, device="cuda")

    for name in SDXL.modules:
        for tensor in getattr(pipeline, name).parameters():
            assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
        for tensor in getattr(pipeline, name).buffers():
            assert tensor.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_are_stocks_in_the_same_dtype(model, dtype):
    engine = Engine(build(model, dtype=dtype, device="cuda"), LIGHTNING)
    stock = stock_pipeline(model, dtype).to("cuda")

    (ours,) = engine.generate(REQUEST)

    theirs = stock(
        prompt=REQUEST.prompt,
        width=256,
        height=256,
        guidance_scale=0.0,
        num_inference_steps=4,
        generator=generators(3)[0],
    ).images[0]
    assert psnr(pixels(ours.image), pixels(theirs)) >= 35


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_and_weighted_prompts_are_near_those_of_the_cpu(model, dtype):
    plan = Plan(
        "a (golden fox)1.4 over the castle, (night)0.4 " + "a red dragon in snow, " * 20,
        "(ugly)1.2",
        *(256, 256),
        steps=2,
        guidance_scale=5.0,
        seeds=(3,),
        prompt_weighting=True,
    )

    ours, full = (
        Engine(build(model, GUIDED, dtype=kind, device=device), GUIDED)
        ._model(None)
        .prompts.encode(plan)
        for device, kind in (("cuda", dtype), ("cpu", torch.float32))
    )

    for name, tensor in ours.items():
        assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
        torch.testing.assert_close(tensor.float().cpu(), full[name], rtol=0.1, atol=0.1)


def test_running_out_of_memory_gives_the_card_back(model):
    large = LIGHTNING.model_copy(update={"native_size": 1024})
    engine = Engine(build(model, large, dtype=torch.float16, device="cuda"), large)
    for size in (
        256,
        512,
    ):  # what libraries keep for themselves at their first use is not the image's
        list(engine.generate(dataclasses.replace(REQUEST, width=size, height=size)))
    torch.cuda.empty_cache()
    used, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()

    # Room to denoise; but the decoder's last block alone makes 32 channels of 2048x2048 halves, 256 MiB.
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + 200 * MIB) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="2048x2048"):
            list(engine.generate(dataclasses.replace(REQUEST, width=2048, height=2048)))
        kept = torch.cuda.memory_reserved() - reserved
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert torch.cuda.memory_allocated() <= used
    # torch reserves at least 20 MiB for anything large, and 2 MiB for what is small, such as the prompt's embeddings.
    assert torch.cuda.max_memory_reserved() >= reserved + 20 * MIB
    assert kept <= 4 * MIB
    (again,) = engine.generate(REQUEST)
    assert again.seed == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_new_version_takes_the_memory_of_the_old_one(model, half_model, dtype):
    def parameters(engine: Engine) -> list[torch.nn.Parameter]:
        return [p for name in SDXL.modules for p in getattr(engine._pipeline, name).parameters()]

    engine = Engine(build(model, dtype=dtype, device="cuda"), LIGHTNING)
    fresh = Engine(build(half_model, dtype=dtype, device="cuda"), LIGHTNING)
    staged = stage(read_configs(half_model), read_tensors(half_model), LIGHTNING)
    places = [parameter.data_ptr() for parameter in parameters(engine)]
    largest = max(parameter.nbytes for parameter in parameters(engine))
    used = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    engine.replace(staged)

    assert [parameter.data_ptr() for parameter in parameters(engine)] == places
    assert torch.cuda.memory_allocated() == used
    assert torch.cuda.max_memory_allocated() <= used + largest + 512  # which it rounds up to
    for mine, theirs in zip(parameters(engine), parameters(fresh), strict=True):
        assert torch.equal(mine, theirs)
    ours, expected = (next(one.generate(REQUEST)).image for one in (engine, fresh))
    np.testing.assert_array_equal(pixels(ours), pixels(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_image_from_graphs_is_bit_for_bit_the_one_without(model, dtype):
    engine = Engine(build(model, dtype=dtype, device="cuda"), LIGHTNING)
    (without,) = engine.generate(REQUEST)

    engine.warm_up()
    assert len(engine._loop._graphs) >= 1
    (replayed,) = engine.generate(REQUEST)

    np.testing.assert_array_equal(pixels(without.image), pixels(replayed.image))


def test_graphs_stay_valid_when_a_new_version_takes_over(model, half_model):
    engine = Engine(build(model, dtype=torch.float16, device="cuda"), LIGHTNING)
    engine.warm_up()
    fresh = Engine(build(half_model, dtype=torch.float16, device="cuda"), LIGHTNING)

    engine.replace(stage(read_configs(half_model), read_tensors(half_model), LIGHTNING))

    assert len(engine._loop._graphs) >= 1
    (ours,), (expected,) = engine.generate(REQUEST), fresh.generate(REQUEST)
    np.testing.assert_array_equal(pixels(ours.image), pixels(expected.image))


def test_every_size_is_ready_after_a_while_without_requests(model):
    engine = Engine(build(model, dtype=torch.float16, device="cuda"), LIGHTNING)
    engine.warm_up()

    engine._loop.when_idle(lambda: None).result(120)

    sizes = {size_for(ratio, LIGHTNING.native_size) for ratio in ASPECT_RATIOS}
    assert len(engine._loop._graphs) == len(sizes)


def test_8_bit_floats_are_near_enough_or_off(model):
    if not computes_float8(torch.device("cuda")):
        pytest.skip("this card does not compute 8-bit floats")
    engine = Engine(build(model, dtype=torch.bfloat16, device="cuda"), LIGHTNING, float8=True)
    (without,) = engine.generate(REQUEST)

    engine.warm_up()

    (made,) = engine.generate(REQUEST)
    assert psnr(pixels(made.image), pixels(without.image)) >= 20


def test_images_in_company_on_a_card_are_near_those_alone(model):
    engine = Engine(build(model, dtype=torch.bfloat16, device="cuda"), LIGHTNING, batch_size=4)
    alone = Engine(build(model, dtype=torch.bfloat16, device="cuda"), LIGHTNING)
    request = dataclasses.replace(REQUEST, num_outputs=4)

    for ours, expected in zip(engine.generate(request), alone.generate(request), strict=True):
        assert psnr(pixels(ours.image), pixels(expected.image)) >= 30


@pytest.mark.timeout(600)
def test_compiled_regions_run_inside_graphs_and_come_out_of_torchs_caches(
    model, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = Engine(build(model, dtype=torch.bfloat16, device="cuda"), LIGHTNING)
    (expected,) = plain.generate(REQUEST)

    for only_from_artifacts in (False, True):
        compiling = Compiling(frozenset({(256, 256)}), only_from_artifacts)
        pipeline = build(model, dtype=torch.bfloat16, device="cuda")
        engine = Engine(pipeline, LIGHTNING, compiling=compiling)
        engine.warm_up()
        (first,) = engine.generate(REQUEST)  # served while code out of the caches is read
        assert psnr(pixels(first.image), pixels(expected.image)) >= 35
        for done in engine.getting_ready:
            done.exception(300)

        assert engine.compiled == compiling.sizes
        assert engine._speed._regions is not None
        assert len(engine._speed._regions) == 2  # the denoiser's pass and the decoder's
        assert len(engine._loop._graphs) >= 1
        (ours,) = engine.generate(REQUEST)
        assert psnr(pixels(ours.image), pixels(expected.image)) >= 35


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prompts_from_graphs_are_bit_for_bit_those_without(model, dtype):
    first = build(model, GUIDED, dtype=dtype, device="cuda")
    engine, plain = Engine(first, GUIDED), build(model, GUIDED, dtype=dtype, device="cuda")
    engine.warm_up()
    prompts = ("a small red boat", "a lighthouse in a storm"), ("a harbour", "fog")

    for prompt, negative in prompts:
        request = dataclasses.replace(
            REQUEST, prompt=prompt, negative_prompt=negative, guidance_scale=5.0, steps=2
        )
        with torch.inference_mode():
            ours = engine._model(None).prompts.encode(engine._model(None).plan(request))
            stock = plain.encode_prompt(prompt, negative_prompt=negative, device="cuda")

        for name, theirs in zip(SDXL.embeddings, stock, strict=True):
            assert torch.equal(ours[name], theirs), name
    assert all("forward" in one.__dict__ for one in engine._model(None).text_encoders)
    assert all(len(one.forward._graphs) == 1 for one in engine._model(None).text_encoders)


@pytest.mark.timeout(600)
def test_no_batch_of_what_is_compiled_here_is_left_for_later(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiling = Compiling(frozenset({(256, 256)}), only_from_artifacts=False)
    pipeline = build(model, dtype=torch.bfloat16, device="cuda")
    engine = Engine(pipeline, LIGHTNING, batch_size=2, compiling=compiling)

    engine.warm_up()

    assert engine.compiled == compiling.sizes
    before = tally()
    for done in engine.getting_ready:
        done.exception(300)
    assert tally() == before
