"""Every family from the Hub to pixels: prepared, published, streamed back, and equal to stock run as its authors do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import GenerationRequest
from preparation import Progress, Request, UsageError, compare, make_plan, upload
from preparation.hub import Hub
from tests.preparation.conftest import Prepare
from tests.preparation.served import served
from tests.support.hub import LoopbackHub
from tests.support.small_families import (
    stock_pipeline,
    write_small_sd3,
    write_small_sd_turbo,
)
from weights import Bucket

PROMPT = "a golden fox over the castle"
SIZE = {"width": 64, "height": 64}


def small_sdxl_turbo(folder: Path) -> Path:
    """SDXL-Turbo's own scheduler over SDXL's parts."""
    write_small_sdxl(folder, lightning=False)
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipeline = DiffusionPipeline.from_pretrained(folder, scheduler=scheduler, local_files_only=True)
    pipeline.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Known:
    """A repo, what stands in for it, and how its authors call it."""

    repo: str
    write: Callable[[Path], Path]
    call: dict[str, Any]


KNOWN = [
    Known("stabilityai/sdxl-turbo", small_sdxl_turbo, {"steps": 1, "guidance_scale": 0.0}),
    Known("stabilityai/sd-turbo", write_small_sd_turbo, {"steps": 1, "guidance_scale": 0.0}),
    Known(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        write_small_sd3,
        {"steps": 28, "guidance_scale": 7.0},
    ),
    Known(
        "stabilityai/stable-diffusion-3.5-large-turbo",
        lambda folder: write_small_sd3(folder, with_t5=False),
        {"steps": 4, "guidance_scale": 0.0},
    ),
    Known(
        "stabilityai/stable-diffusion-3.5-medium",
        lambda folder: write_small_sd3(folder, is_3_5_medium=True),
        {"steps": 40, "guidance_scale": 4.5},
    ),
]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.repo)
def test_a_known_repo_goes_from_the_hub_to_the_pixels_its_authors_get(
    loopback_hub: LoopbackHub,
    run: Prepare,
    hub: Hub,
    bucket: Bucket,
    quiet: Progress,
    tmp_path: Path,
    known: Known,
) -> None:
    source = known.write(tmp_path / "source")
    loopback_hub.add(known.repo, source)
    request = Request(known.repo, hub=hub, folder=tmp_path / "prepared")

    prepared = run(known.repo)
    upload(request, compare(request, prepared, bucket, quiet), quiet)
    engine = served(bucket, known.repo)
    (made,) = engine.generate(GenerationRequest(PROMPT, **SIZE, seed=5))

    assert (made.steps, made.guidance_scale) == (known.call["steps"], known.call["guidance_scale"])
    expected = stock_pipeline(source)(
        PROMPT,
        **SIZE,
        num_inference_steps=known.call["steps"],
        guidance_scale=known.call["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(expected))


def test_a_finetune_keeps_its_pipelines_own_steps_and_guidance(
    loopback_hub: LoopbackHub, run: Prepare, tmp_path: Path
) -> None:
    loopback_hub.add("someone/sd-turbo-finetune", write_small_sd_turbo(tmp_path / "source"))

    recipe = run("someone/sd-turbo-finetune").recipe

    assert (recipe.pipeline, recipe.default_steps, recipe.guidance_scale) == (
        "StableDiffusionPipeline",
        50,
        7.5,
    )


def test_a_known_repo_that_holds_another_pipeline_is_refused(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    loopback_hub.add("stabilityai/sdxl-turbo", write_small_sd_turbo(tmp_path / "source"))

    with pytest.raises(UsageError, match="is a StableDiffusionPipeline, but SDXL-Turbo is a"):
        make_plan(Request("stabilityai/sdxl-turbo", hub=hub, folder=tmp_path))


def test_what_sd3_can_do_without_is_left_out_when_the_source_lacks_it(
    loopback_hub: LoopbackHub, run: Prepare, tmp_path: Path
) -> None:
    loopback_hub.add("someone/sd3-without-t5", write_small_sd3(tmp_path / "source", with_t5=False))

    prepared = run("someone/sd3-without-t5")

    assert not (prepared.folder / "text_encoder_3").exists()
    assert not (prepared.folder / "tokenizer_3").exists()
