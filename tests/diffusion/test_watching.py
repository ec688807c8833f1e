"""Watching an image come about: what is told, what the pictures show, and that neither touches a pixel of the image."""

import dataclasses
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from diffusion import previews
from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import NonFiniteError
from diffusion.recipe import Recipe, SchedulerRecipe
from diffusion.refresh import stage
from diffusion.watching import Step
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    build,
    build_engine,
    generators,
    pixels,
    read_configs,
    read_tensors,
    stock_pipeline,
)
from tests.support.small_families import write_small_sd3

REQUEST = GenerationRequest(prompt="a small red boat", width=96, height=64, steps=4, seed=3)


def watched(engine: Engine, request: GenerationRequest = REQUEST, *, with_previews: bool = True):
    steps: list[Step] = []
    images = list(engine.generate(request, None, steps.append, previews=with_previews))
    return steps, images


def only(images):
    (image,) = images
    return pixels(image.image)


def said_here(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("diffusion.")]


@pytest.fixture(scope="session")
def with_tiny_vae(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tiny VAE beside its components, whose weights are drawn at random."""
    folder = tmp_path_factory.mktemp("with-preview") / "model"
    shutil.copytree(model, folder)
    write_tiny_vae(folder, seed=1)
    return folder


def write_tiny_vae(folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
        )
    tiny.save_pretrained(folder / "preview_vae")


def tiny_picture(folder: Path, latents: torch.Tensor) -> Image.Image:
    """What stock diffusers' tiny VAE makes of latents, from 0 to 1."""
    tiny = AutoencoderTiny.from_pretrained(folder / "preview_vae")
    with torch.inference_mode():
        decoded = tiny.decode(latents, return_dict=False)[0]
    levels = decoded.add(1).div(2).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels[0].movedim(0, -1).numpy())


def test_there_is_one_step_after_another_for_each_image(lightning):
    steps, images = watched(
        lightning, dataclasses.replace(REQUEST, num_outputs=2), with_previews=False
    )

    # Images that share the denoiser's passes are told of in turn.
    for seed in (3, 4):
        mine = [step for step in steps if step.seed == seed]
        assert mine == [Step(seed, step, 4, None) for step in (1, 2, 3, 4)]
    assert [image.seed for image in images] == [3, 4]


def test_a_step_is_told_of_before_the_next_is_taken(model):
    pipeline = build(model)
    happened = []
    pipeline.unet.register_forward_hook(lambda *_: happened.append("denoised"))
    pipeline.vae.decoder.register_forward_hook(lambda *_: happened.append("decoded"))

    list(Engine(pipeline, LIGHTNING).generate(REQUEST, None, lambda s: happened.append(s.step)))

    assert happened == ["denoised", 1, "denoised", 2, "denoised", 3, "denoised", 4, "decoded"]


@pytest.mark.parametrize("with_previews", [False, True])
@pytest.mark.parametrize("folder", ["model", "with_tiny_vae"])
def test_no_pixel_changes_when_somebody_watches(request, stock, folder, with_previews):
    engine = build_engine(request.getfixturevalue(folder))

    _, images = watched(engine, with_previews=with_previews)

    (generator,) = generators(3)
    theirs = stock(
        prompt=REQUEST.prompt,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        generator=generator,
    ).images[0]
    np.testing.assert_array_equal(only(images), pixels(theirs))
    np.testing.assert_array_equal(only(engine.generate(REQUEST)), pixels(theirs))


@pytest.mark.parametrize(
    "scheduler",
    [
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "PNDMScheduler",
    ],
)
def test_other_schedulers_are_watched_without_a_trace_too(model, scheduler):
    recipe = GUIDED.model_copy(update={"scheduler": SchedulerRecipe(class_name=scheduler)})
    engine = build_engine(model, recipe)
    request = dataclasses.replace(REQUEST, width=64, guidance_scale=0.0)
    unwatched = only(engine.generate(request))

    steps, images = watched(engine, request)

    np.testing.assert_array_equal(only(images), unwatched)
    assert [step.step for step in steps] == list(range(1, steps[0].steps + 1))
    assert all(step.preview.size == (8, 8) for step in steps)


def test_a_tiny_vae_shows_what_the_steps_would_come_to(with_tiny_vae):
    pipeline = build(with_tiny_vae)
    latents = []
    pipeline.vae.post_quant_conv.register_forward_hook(
        lambda _, inputs, __: latents.append(inputs[0] * pipeline.vae.config.scaling_factor)
    )

    steps, _ = watched(Engine(pipeline, LIGHTNING))

    assert [step.preview.size for step in steps] == [(96, 64)] * 4
    # Euler's last estimate of the clean latents is where it ends.
    theirs = pixels(tiny_picture(with_tiny_vae, latents[-1]))
    assert np.abs(pixels(steps[-1].preview) - theirs).max() <= 1
    assert (pixels(steps[0].preview) != pixels(steps[-1].preview)).any()


def test_pictures_of_what_is_to_come_are_nearer_to_it_than_pictures_of_half_noise(model):
    engine = build_engine(model)
    steps, _ = watched(engine)
    last = pixels(steps[-1].preview)
    pipeline = build(model)
    noisy = []
    maker = previews.Previews(pipeline)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)

    def keep(_pipeline: object, _step: int, _time: object, tensors: dict) -> dict:
        noisy.append(pixels(maker.picture(tensors["latents"])))
        return tensors

    (generator,) = generators(3)
    pipeline(
        prompt=REQUEST.prompt,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        generator=generator,
        output_type="latent",
        callback_on_step_end=keep,
    )

    for step, of_noise in zip(steps[:2], noisy[:2], strict=True):
        assert np.abs(pixels(step.preview) - last).mean() < np.abs(of_noise - last).mean()


def test_stable_diffusion_3_s_straight_line_is_followed_to_its_end(tmp_path, monkeypatch):
    folder = write_small_sd3(tmp_path / "sd3", with_t5=False)
    engine = build_engine(folder, Recipe.from_configs(read_configs(folder)))
    request = dataclasses.replace(REQUEST, width=64, guidance_scale=0.0)
    unwatched = only(engine.generate(request))
    shown = []
    monkeypatch.setattr(previews.Previews, "picture", lambda _, latents: shown.append(latents))
    ends = []
    engine._pipeline.vae.decoder.register_forward_hook(lambda _, inputs, __: ends.append(inputs[0]))

    _, images = watched(engine, request)

    np.testing.assert_array_equal(only(images), unwatched)
    config = engine._pipeline.vae.config
    (end,) = ends
    torch.testing.assert_close(shown[-1] / config.scaling_factor + config.shift_factor, end)
    distances = [(latents - shown[-1]).abs().mean().item() for latents in shown]
    assert distances == sorted(distances, reverse=True)


class _LinearVae(torch.nn.Module):
    """A decoder that is linear, so that the map to be found is known: each latent is a square of one colour."""

    def __init__(self, colours: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.colours, self.shift = colours, shift
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(
            latent_channels=len(colours),
            latents_mean=None,
            latents_std=None,
            scaling_factor=0.5,
            shift_factor=None,
        )

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        colours = torch.einsum("nchw,cd->ndhw", latents, self.colours)
        colours = colours + self.shift.view(1, 3, 1, 1)
        return (torch.nn.functional.interpolate(colours, scale_factor=8),)


def test_the_map_to_colours_is_the_one_that_the_vae_itself_makes():
    colours = torch.tensor([[0.05, 0.0, 0.01], [0.0, 0.04, 0.0], [0.02, -0.03, 0.05], [0, 0, 0.01]])
    shift = torch.tensor([0.1, 0.0, -0.2])

    found = previews.fit(_LinearVae(colours, shift))

    torch.testing.assert_close(found[:-1], colours / 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[-1], shift, atol=1e-4, rtol=0)


def test_without_a_tiny_vae_a_picture_has_the_colours_of_the_image(lightning):
    steps, (image,) = watched(lightning, dataclasses.replace(REQUEST, width=256, height=256))

    small = image.image.resize((32, 32), Image.Resampling.BOX)
    assert steps[-1].preview.size == (32, 32)
    # The small model's VAE was never trained and is far from linear; a picture that shows nothing of it has 0.
    assert np.corrcoef(pixels(steps[-1].preview).ravel(), pixels(small).ravel())[0, 1] > 0.4


def test_the_vae_is_looked_at_once_and_only_when_a_picture_is_wanted(model, monkeypatch):
    engine = build_engine(model)
    fitted = []
    fit = previews.fit
    monkeypatch.setattr(previews, "fit", lambda vae: fitted.append(vae) or fit(vae))

    watched(engine, with_previews=False)
    assert fitted == []
    watched(engine)
    watched(engine)

    assert len(fitted) == 1


def test_large_pictures_are_made_small(with_tiny_vae):
    pipeline = build(with_tiny_vae)
    latents = torch.randn(1, 4, 48, 80, generator=torch.Generator().manual_seed(0))

    assert previews.Previews(pipeline).picture(latents).size == (256, 154)


def test_a_watch_that_raises_is_not_called_again_and_hurts_nothing(lightning, caplog):
    called = []

    def fail(step: Step) -> None:
        called.append(step)
        raise RuntimeError("nobody is listening")

    images = lightning.generate(REQUEST, None, fail)

    np.testing.assert_array_equal(only(images), only(lightning.generate(REQUEST)))
    assert [(step.seed, step.step) for step in called] == [(3, 1)]
    assert said_here(caplog) == ["Nobody is told any more how far seed 3 is."]


def test_a_vae_that_overflows_gives_no_previews_one_line_and_the_named_error(model, caplog):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    pipeline.vae.decoder.conv_out.bias[0] = float("nan")
    steps: list[Step] = []

    with caplog.at_level(logging.INFO, logger="diffusion"), pytest.raises(NonFiniteError):
        list(engine.generate(REQUEST, None, steps.append, previews=True))

    assert [step.preview for step in steps] == [None] * 4
    (line,) = said_here(caplog)
    assert line.startswith(
        "No preview from now on: making one failed (ValueError: the VAE in torch.float32 decodes"
    )


def test_a_picture_that_finds_no_memory_is_left_out_and_the_next_one_is_tried(model, monkeypatch):
    engine = build_engine(model)
    fit, tried = previews.fit, []

    def no_memory_at_first(vae: object) -> torch.Tensor:
        tried.append(vae)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(vae)

    monkeypatch.setattr(previews, "fit", no_memory_at_first)

    steps, _ = watched(engine)

    assert [step.preview is None for step in steps] == [True, False, False, False]


def test_a_tiny_vae_beside_a_model_changes_nothing_for_stock_diffusers(with_tiny_vae, stock):
    call = {"prompt": "x", "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 0}
    (one, other) = generators(5, 5)

    theirs = stock_pipeline(with_tiny_vae)(**call, generator=one).images[0]

    np.testing.assert_array_equal(pixels(theirs), pixels(stock(**call, generator=other).images[0]))


def test_a_tiny_vae_is_built_in_the_pipeline_s_dtype_and_is_no_component_of_it(
    with_tiny_vae, caplog
):
    pipeline = build(with_tiny_vae, dtype=torch.bfloat16)

    assert isinstance(pipeline.preview_vae, AutoencoderTiny)
    assert {weight.dtype for weight in pipeline.preview_vae.parameters()} == {torch.bfloat16}
    assert "preview_vae" not in pipeline.components
    assert said_here(caplog) == []


@pytest.fixture
def stage_folder():
    return lambda folder, version: stage(
        read_configs(folder), read_tensors(folder), LIGHTNING, version
    )


def test_a_version_with_a_tiny_vae_takes_over_from_one_without_and_back(
    model, with_tiny_vae, stage_folder
):
    engine = build_engine(model)
    assert watched(engine)[0][0].preview.size == (12, 8)

    engine.replace(stage_folder(with_tiny_vae, "with"))
    assert watched(engine)[0][0].preview.size == (96, 64)

    engine.replace(stage_folder(model, "without"))
    assert watched(engine)[0][0].preview.size == (12, 8)


def test_another_tiny_vae_is_copied_into_the_place_of_the_old_one(
    with_tiny_vae, stage_folder, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(with_tiny_vae, other)
    write_tiny_vae(other, seed=2)
    pipeline = build(with_tiny_vae)
    engine = Engine(pipeline, LIGHTNING)
    places = [weight.data_ptr() for weight in pipeline.preview_vae.parameters()]
    before = watched(engine)[0][-1].preview

    engine.replace(stage_folder(other, "other"))

    after = watched(engine)[0][-1].preview
    served = engine._pipeline.preview_vae
    assert [weight.data_ptr() for weight in served.parameters()] == places
    assert (pixels(before) != pixels(after)).any()
    np.testing.assert_array_equal(
        pixels(after), pixels(watched(build_engine(other))[0][-1].preview)
    )
