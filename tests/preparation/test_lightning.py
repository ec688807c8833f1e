"""SDXL-Lightning from the real repos' names and layout: what is asked of the Hub, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from preparation import UsageError
from tests.preparation.conftest import BASE, LIGHTNING, VAE, Models, Prepare
from tests.support.hub import LoopbackHub

NEEDED = {
    f"{LIGHTNING}/README.md",
    f"{LIGHTNING}/sdxl_lightning_4step_unet.safetensors",
    f"{VAE}/README.md",
    f"{VAE}/config.json",
    f"{VAE}/diffusion_pytorch_model.safetensors",
    *(
        f"{BASE}/{path}"
        for path in (
            "README.md",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.fp16.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "tokenizer_2/merges.txt",
            "tokenizer_2/special_tokens_map.json",
            "tokenizer_2/tokenizer_config.json",
            "tokenizer_2/vocab.json",
            "unet/config.json",
        )
    ),
}


def test_only_the_needed_files_are_requested(lightning_hub: LoopbackHub, run: Prepare) -> None:
    run(LIGHTNING)
    assert lightning_hub.requested_files() == NEEDED


def test_recipe_is_the_distillations_own(lightning_hub: LoopbackHub, run: Prepare) -> None:
    recipe = run(LIGHTNING).recipe
    assert recipe.scheduler.class_name == "EulerDiscreteScheduler"
    assert recipe.scheduler.config == {"timestep_spacing": "trailing"}
    assert (recipe.dtype, recipe.steps, recipe.default_steps) == ("float16", (4,), 4)
    assert (recipe.guidance_scale, recipe.guidance_free) == (0.0, True)
    assert (
        recipe.native_size == 256
    )  # the small stand-in's, as its configs say; 1024 for the real one
    assert recipe.source is not None
    assert recipe.source.repo == LIGHTNING
    assert recipe.source.revision == lightning_hub.repositories[LIGHTNING].branches["main"]
    assert recipe.source.licence == "openrail++"


def test_result_is_a_plain_folder_in_half_precision(
    lightning_hub: LoopbackHub, run: Prepare
) -> None:
    folder = run(LIGHTNING).folder
    weights = {
        path.relative_to(folder).as_posix(): load_file(path)
        for path in folder.rglob("*.safetensors")
    }
    assert set(weights) == {
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert {tensor.dtype for tensors in weights.values() for tensor in tensors.values()} == {
        torch.float16
    }
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing"
    assert scheduler["beta_schedule"] == "scaled_linear"


def test_stock_diffusers_draws_the_same_picture_from_it_as_from_the_parts(
    lightning_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    # given the parts, put together by hand as the authors describe
    unet = UNet2DConditionModel.from_pretrained(models.other_half, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(models.other_full, subfolder="vae", dtype=torch.float16)
    by_hand = StableDiffusionXLPipeline.from_pretrained(
        models.half, unet=unet.float(), vae=vae.float(), dtype=torch.float32
    )
    by_hand.scheduler = EulerDiscreteScheduler.from_config(
        by_hand.scheduler.config, timestep_spacing="trailing"
    )
    # when
    prepared = StableDiffusionXLPipeline.from_pretrained(run(LIGHTNING).folder, dtype=torch.float32)
    # then
    assert np.array_equal(_picture(prepared), _picture(by_hand))


def _picture(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    images = pipeline(
        "the space needle", num_inference_steps=4, guidance_scale=0, generator=generator
    ).images
    return np.asarray(images[0])


def test_unet_of_another_layout_is_refused(
    lightning_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path
) -> None:
    # given a checkpoint with one tensor renamed, as another program's layout would have it
    changed = tmp_path / "changed"
    changed.mkdir()
    name = "sdxl_lightning_4step_unet.safetensors"
    tensors = load_file(models.lightning / name)
    tensors["model.diffusion_model.out.2.bias"] = tensors.pop("conv_out.bias")
    save_file(tensors, changed / name)
    lightning_hub.add(LIGHTNING, changed)
    # when, then
    with pytest.raises(
        UsageError, match=r"unet of ByteDance/SDXL-Lightning misses tensor conv_out\.bias"
    ):
        run(LIGHTNING)
    assert not list((tmp_path / "prepared").glob("*"))


def test_unet_of_another_size_is_refused(
    lightning_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    name = "sdxl_lightning_4step_unet.safetensors"
    tensors = load_file(models.lightning / name)
    tensors["conv_in.weight"] = torch.zeros(32, 9, 3, 3, dtype=torch.float16)
    save_file(tensors, changed / name)
    lightning_hub.add(LIGHTNING, changed)
    with pytest.raises(UsageError, match=r"conv_in\.weight has shape \(32, 9, 3, 3\) where"):
        run(LIGHTNING)


def test_missing_checkpoint_is_named(
    lightning_hub: LoopbackHub, run: Prepare, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("gone")
    commit = lightning_hub.add(LIGHTNING, empty)
    with pytest.raises(UsageError, match=f"{commit} has no sdxl_lightning_4step_unet.safetensors"):
        run(LIGHTNING)


def test_earlier_revision_can_be_chosen_and_is_recorded(
    lightning_hub: LoopbackHub, run: Prepare, tmp_path: Path
) -> None:
    # given a main branch that has lost the checkpoint
    earlier = lightning_hub.repositories[LIGHTNING].branches["main"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("gone")
    lightning_hub.add(LIGHTNING, empty)
    # when
    recipe = run(LIGHTNING, revision=earlier).recipe
    # then
    assert recipe.source is not None
    assert recipe.source.revision == earlier
