"""Which files are chosen, as a pure decision over names."""

from __future__ import annotations

import pytest

from preparation.errors import UsageError
from preparation.select import published_model_index, read_model_index, select, select_weights

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

LISTING = (
    *("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
    *("text_encoder/model.safetensors", "text_encoder_2/config.json", "tokenizer/vocab.json"),
)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.safetensors"]),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ["diffusion_pytorch_model.fp16.safetensors"],
        ),
        (
            [
                "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.safetensors",
            ],
            [
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
            ],
        ),
        (
            ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
            ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
        ),
        (  # an incomplete fp16 set is worth nothing
            [
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors",
            ],
            ["diffusion_pytorch_model.safetensors"],
        ),
        (  # other variants and other programs' files are not taken
            ["model.non_ema.safetensors", "model.safetensors", "model.onnx", "openvino_model.bin"],
            ["model.safetensors"],
        ),
        (["nested/model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_one_safetensors_set_is_chosen(names: list[str], chosen: list[str]) -> None:
    found = select_weights([f"unet/{name}" for name in names], "unet", "the repo")
    assert list(found.files) == [f"unet/{name}" for name in chosen]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["diffusion_pytorch_model.bin"],
            r"only pickle weights \(unet/diffusion_pytorch_model.bin\)",
        ),
        (["model.ckpt"], r"only pickle weights \(unet/model.ckpt\)"),
        (["model-00001-of-00003.safetensors"], "shard 2 of 3 is missing"),
        (["weights.safetensors"], "unet/weights.safetensors, which is not a name diffusers loads"),
        (["config.json"], "no safetensors weights for unet under unet/"),
    ],
)
def test_component_without_a_usable_set_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_weights([f"unet/{name}" for name in names], "unet", "the repo")


def test_missing_component_is_named() -> None:
    index = {name: value for name, value in INDEX.items() if name != "text_encoder_2"}
    with pytest.raises(UsageError, match="lists no text_encoder_2"):
        select(LISTING, index, "the repo")


def test_missing_config_is_named() -> None:
    with pytest.raises(UsageError, match=r"the repo has no scheduler/scheduler_config\.json"):
        select(["model_index.json"], INDEX, "the repo")


def test_component_that_no_pipeline_needs_is_left_behind() -> None:
    index = {**INDEX, "image_encoder": ["transformers", "CLIPVision"], "force_zeros": True}
    published = published_model_index(index)
    assert published["image_encoder"] == [None, None]
    assert published["unet"] == INDEX["unet"]
    assert published["force_zeros"] is True


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"_class_name": "FluxPipeline"}',
            "FluxPipeline.*Supported pipelines: StableDiffusionXLPipe",
        ),
        (b"[]", "folder without a pipeline class"),
        (b"<html>", "is not JSON"),
    ],
)
def test_another_pipeline_is_refused_with_those_supported(data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_model_index(data, "the repo")
