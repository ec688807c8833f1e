"""The single files are laid out as their authors lay them out: stock diffusers reads every tensor of them back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

from demo.small_sdxl import write_small_sdxl
from tests.support.single_files import read_weights, write_single_file
from tests.support.small_families import (
    stock_pipeline,
    write_small_sd1,
    write_small_sd2,
    write_small_sd3,
    write_small_sd_turbo,
)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "xl": partial(write_small_sdxl, lightning=False),
    "xl, recognized": partial(write_small_sdxl, lightning=False, text_2_layers=10),
    "xl, sharded": partial(write_small_sdxl, lightning=False, shard_bytes=1_000_000),
    "sd1": write_small_sd1,
    "sd2": write_small_sd2,
    "sd-turbo": write_small_sd_turbo,
    "sd3": write_small_sd3,
    "sd3 without t5": partial(write_small_sd3, with_t5=False),
    "sd3.5 medium": partial(write_small_sd3, is_3_5_medium=True),
    "sd3.5 large": partial(write_small_sd3, is_3_5_large=True),
}
PREFIXES = {
    "xl": (
        "model.diffusion_model.",
        "first_stage_model.",
        "conditioner.embedders.0.transformer.text_model.",
        "conditioner.embedders.1.model.",
    ),
    "sd1": (
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.transformer.text_model.",
    ),
    "sd2": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."),
    "sd3.5 medium": (
        "model.diffusion_model.",
        "first_stage_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "text_encoders.clip_g.transformer.",
        "text_encoders.t5xxl.transformer.",
    ),
}
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each arrangement's folder, written once, with no two tensors alike."""
    root = tmp_path_factory.mktemp("arrangements")

    def folder(arrangement: str) -> Path:
        path = root / arrangement
        if not path.exists():
            draw_anew(WRITERS[arrangement](path))
        return path

    return folder


def draw_anew(folder: Path) -> None:
    """Give every tensor numbers of its own: a new model's norms are all ones, and could be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = {
            name: tensor if is_identity(tensor) else torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})


def is_identity(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and torch.equal(tensor, torch.eye(*tensor.shape))


def from_single_file(file: Path, folder: Path, scratch: Path) -> Any:
    """Stock diffusers' reading of the file, with the folder's configuration but none of its weights to fall back on."""
    config = scratch / "config-only"
    shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = json.loads((folder / "model_index.json").read_text())
    # It has to be told which parts the folder does without, as `from_pretrained` has.
    absent = {name: None for name, part in index.items() if part == [None, None]}
    pipeline: Any = getattr(diffusers, index["_class_name"]).from_single_file(
        str(file), config=str(config), local_files_only=True, **absent
    )
    if getattr(pipeline, "text_encoder_3", None) is not None:
        pipeline.text_encoder_3.eval()  # diffusers 0.42.1 forgets to, and T5 goes on dropping one value in ten
    return pipeline


def assert_holds_the_folders_weights(pipeline: Any, folder: Path) -> None:
    expected = stock_pipeline(folder)
    names = [name for name in PARTS if getattr(expected, name, None) is not None]
    assert "vae" in names
    for name in names:
        read = getattr(pipeline, name).state_dict()
        own = getattr(expected, name).state_dict()
        assert read.keys() == own.keys()
        for key, tensor in own.items():
            assert read[key].dtype == tensor.dtype, (name, key)
            assert torch.equal(read[key], tensor), (name, key)


def numbers(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("arrangement", WRITERS)
def test_stock_diffusers_reads_the_folders_own_weights_from_the_file_and_leaves_none_unread(
    arrangement: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(arrangement)
    file = write_single_file(folder, tmp_path / "model.safetensors")

    pipeline = from_single_file(file, folder, tmp_path)

    assert_holds_the_folders_weights(pipeline, folder)
    # As many numbers in the file as in the folder: since each of the folder's was read from it, none is left over.
    parts = [read_weights(folder / name) for name in PARTS if (folder / name).exists()]
    in_folder = sum(
        numbers({n: t for n, t in part.items() if not is_identity(t)}) for part in parts
    )
    tensors = load_file(file)
    twice = tensors.pop("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight", None)
    assert numbers(tensors) == in_folder
    if twice is not None:
        assert torch.equal(twice, tensors["text_encoders.t5xxl.transformer.shared.weight"])


@pytest.mark.parametrize(
    ("arrangement", "model_type"),
    [
        ("xl", "v1"),  # what it makes of everything that it does not know
        ("xl, recognized", "xl_base"),
        ("sd1", "v1"),
        ("sd2", "v2"),
        ("sd-turbo", "v1"),
        ("sd3", "v1"),
        ("sd3.5 medium", "v1"),
        ("sd3.5 large", "sd35_large"),
    ],
)
def test_what_stock_diffusers_takes_the_file_for(
    arrangement: str, model_type: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_single_file(folder_of(arrangement), tmp_path / "model.safetensors")
    assert infer_diffusers_model_type(load_file(file)) == model_type


@pytest.mark.parametrize("arrangement", ["xl, recognized", "sd1", "sd2", "sd3.5 large"])
def test_what_is_recognized_paints_as_a_folder_and_as_a_file(
    arrangement: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(arrangement)
    file = write_single_file(folder, tmp_path / "model.safetensors")

    pictures = [
        pipeline(
            "a golden fox",
            width=64,
            height=64,
            num_inference_steps=1,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).images
        for pipeline in (stock_pipeline(folder), from_single_file(file, folder, tmp_path))
    ]

    assert np.isfinite(pictures[0]).all()
    assert pictures[0].std() > 0.05, "a picture, not one colour"
    assert np.array_equal(*pictures)


# Names and dimensions that the authors' published files have.
@pytest.mark.parametrize(
    ("arrangement", "dimensions"),
    [
        (
            "xl",
            {
                "model.diffusion_model.time_embed.0.weight": 2,
                "model.diffusion_model.label_emb.0.0.weight": 2,
                "model.diffusion_model.input_blocks.0.0.weight": 4,
                "model.diffusion_model.input_blocks.2.0.op.weight": 4,
                "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": 2,
                "model.diffusion_model.output_blocks.1.2.conv.weight": 4,
                "model.diffusion_model.out.2.weight": 4,
                "first_stage_model.encoder.mid.attn_1.q.weight": 4,
                "first_stage_model.decoder.up.3.upsample.conv.weight": 4,
                "first_stage_model.quant_conv.weight": 4,
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": 1,
                "conditioner.embedders.1.model.positional_embedding": 2,
                "conditioner.embedders.1.model.text_projection": 2,
                "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": 2,
                "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_proj.bias": 1,
            },
        ),
        (
            "sd1",
            {
                "model.diffusion_model.input_blocks.1.1.proj_in.weight": 4,
                "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": 4,
                "model.diffusion_model.output_blocks.2.1.conv.weight": 4,
                "model.diffusion_model.output_blocks.5.2.conv.weight": 4,
                "model.diffusion_model.output_blocks.11.0.skip_connection.weight": 4,
                "first_stage_model.decoder.mid.attn_1.proj_out.weight": 4,
                "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": 2,
            },
        ),
        (
            "sd2",
            {
                "model.diffusion_model.input_blocks.2.1.proj_in.weight": 2,
                "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": 2,
                "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.2.bias": 1,
                "cond_stage_model.model.positional_embedding": 2,
                "cond_stage_model.model.token_embedding.weight": 2,
                "cond_stage_model.model.ln_final.weight": 1,
                "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias": 1,
            },
        ),
        (
            "sd3.5 medium",
            {
                "model.diffusion_model.pos_embed": 3,
                "model.diffusion_model.x_embedder.proj.weight": 4,
                "model.diffusion_model.t_embedder.mlp.2.bias": 1,
                "model.diffusion_model.y_embedder.mlp.0.weight": 2,
                "model.diffusion_model.context_embedder.weight": 2,
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": 1,
                "model.diffusion_model.joint_blocks.0.context_block.attn.ln_k.weight": 1,
                "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight": 2,
                "model.diffusion_model.joint_blocks.1.context_block.attn.qkv.weight": 2,
                "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight": 2,
                "model.diffusion_model.final_layer.adaLN_modulation.1.weight": 2,
                "model.diffusion_model.final_layer.linear.weight": 2,
                "first_stage_model.decoder.mid.attn_1.k.weight": 4,
                "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight": 2,
                "text_encoders.clip_g.transformer.text_projection.weight": 2,
                "text_encoders.t5xxl.transformer.shared.weight": 2,
            },
        ),
    ],
)
def test_tensors_are_named_and_shaped_as_in_the_published_files(
    arrangement: str,
    dimensions: dict[str, int],
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tensors = load_file(write_single_file(folder_of(arrangement), tmp_path / "model.safetensors"))
    assert {name: tensors[name].ndim for name in dimensions} == dimensions
    strangers = [name for name in tensors if not name.startswith(PREFIXES[arrangement])]
    assert strangers == []


@pytest.mark.parametrize(
    ("arrangement", "without", "absent"),
    [
        ("xl", {"vae", "text_encoder_2"}, ("first_stage_model.", "conditioner.embedders.1.")),
        ("sd3", {"text_encoder_3"}, ("text_encoders.t5xxl.",)),
    ],
)
def test_components_are_left_out_and_others_stay_as_they_are(
    arrangement: str,
    without: set[str],
    absent: tuple[str, ...],
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = folder_of(arrangement)
    whole = load_file(write_single_file(folder, tmp_path / "whole.safetensors"))
    part = load_file(write_single_file(folder, tmp_path / "part.safetensors", without=without))

    assert part.keys() == {name for name in whole if not name.startswith(absent)}
    assert part.keys() < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


def test_tensors_are_cast_and_further_ones_are_added_as_they_are(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    positions = torch.arange(77)[None]
    name = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    file = write_single_file(
        folder_of("xl"),
        tmp_path / "half" / "model.safetensors",
        dtype=torch.float16,
        extra={name: positions},
    )
    tensors = load_file(file)
    assert torch.equal(tensors.pop(name), positions)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_pipeline_a_component_and_a_tensor_that_have_no_place_are_named(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    target = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"no component \['prior'\] to leave out"):
        write_single_file(folder_of("xl"), target, without={"prior"})

    other = tmp_path / "other"
    shutil.copytree(folder_of("xl"), other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "decoder.mid_block.filter.weight": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match=r"decoder\.mid_block\.filter\.weight has no place"):
        write_single_file(other, target)

    sd3 = tmp_path / "sd3"
    shutil.copytree(folder_of("sd3"), sd3)
    shutil.copy(sd3 / "text_encoder_2" / "model.safetensors", sd3 / "text_encoder")
    with pytest.raises(ValueError, match="projection of Stable Diffusion 3's first text encoder"):
        write_single_file(sd3, target)

    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline"):
        write_single_file(other, target)
    assert not target.exists()
