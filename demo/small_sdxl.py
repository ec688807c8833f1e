"""Writes a small but real Stable Diffusion XL model: stock diffusers classes, a few MB, the same bytes every time.

Nothing is trained: the weights are drawn from the seed and shaped so that four Euler steps give a colourful abstract
picture that follows the prompt. `small_weights` draws them; this module knows the architecture and the folder layout.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from demo.small_tokenizer import END, START, vocabulary, write_tokenizer
from demo.small_weights import Numbers, draw_text_encoder, draw_unet, draw_vae, portable_numbers
from diffusion.recipe import Recipe, SchedulerRecipe

DType = Literal["float32", "float16", "bfloat16"]
NATIVE_SIZE = 256
VAE_SCALE_FACTOR = 8
GROUPS = 8  # of every group norm; the UNet's pass-through channels count on it (see small_weights)


@dataclass(frozen=True)
class Dimensions:
    """What makes one model of this architecture larger than another: the configurations of its parts."""

    text: Any
    text_2: Any
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]


@dataclass(frozen=True)
class Component:
    """One weight-carrying part: its folder, its file's stem, and the parameters' shapes under their published names."""

    folder: str
    stem: str
    config: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]


def write_small_sdxl(
    folder: Path,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    width: int = 1,
    lightning: bool = True,
    steps: tuple[int, ...] = (4,),
    shard_bytes: int | None = None,
    text_2_layers: int = 3,
    native_size: int = NATIVE_SIZE,
) -> Path:
    """Write a `StableDiffusionXLPipeline` folder and return its path.

    Args:
        seed: every weight follows from it; the same arguments give the same bytes on any machine.
        dtype: what the files hold.
        width: multiplies the UNet's channels. 1 gives 11 MB in float32, and the UNet's share (8 MB) grows with its
            square: 7 gives some 400 MB. No more than one component's weights are in memory at a time.
        lightning: also write `recipe.json`, saying that this is a few-step model (Euler trailing, no guidance).
        steps: the step counts that recipe allows; the first is its default.
        shard_bytes: split weight files larger than this, as the Hub's large models are, with their index.
        text_2_layers: of the second text encoder. SDXL's own has 32, and a single-file checkpoint is known as SDXL's by
            the tenth.
        native_size: what that recipe says the model is best at; the weights do not depend on it.
    """
    recipe = lightning_recipe(dtype, steps, native_size) if lightning else None
    dimensions = _small_dimensions(width, dtype, text_2_layers)
    write_sdxl(folder, dimensions, recipe, seed=seed, dtype=dtype, shard_bytes=shard_bytes)
    return folder


def write_sdxl(
    folder: Path,
    dimensions: Dimensions,
    recipe: Mapping[str, Any] | None,
    *,
    seed: int,
    dtype: DType,
    shard_bytes: int | None,
    numbers: Numbers = portable_numbers,
) -> None:
    """Write a folder of any dimensions; `numbers` are what its weights are shaped from."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    for component, tensors in _components(dimensions, seed, numbers):
        _write_json(folder / component.folder / "config.json", {**component.config})
        # One by one: a large part is not to be there twice.
        cast = {name: tensors.pop(name).to(torch_dtype).contiguous() for name in [*tensors]}
        _write_weights(folder / component.folder, component.stem, cast, shard_bytes)
        del tensors, cast
    write_tokenizer(folder / "tokenizer", pad_token=END)
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    _scheduler().save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", _model_index())
    if recipe is not None:
        _write_json(folder / "recipe.json", recipe)


def _components(
    dimensions: Dimensions, seed: int, numbers: Numbers
) -> Iterator[tuple[Component, dict[str, torch.Tensor]]]:
    with torch.device("meta"):  # shapes only: the modules' own random weights are never made
        encoder = _make(CLIPTextModel, config=dimensions.text)
        encoder_2 = _make(CLIPTextModelWithProjection, config=dimensions.text_2)
        unet = _make(UNet2DConditionModel, **dimensions.unet)
        vae = _make(AutoencoderKL, **dimensions.vae)

    for name, model in (("text_encoder", encoder), ("text_encoder_2", encoder_2)):
        # Published CLIP files all carry this prefix, also where newer transformers classes dropped it.
        shapes = {
            key
            if key.startswith(("text_model.", "text_projection."))
            else f"text_model.{key}": value.shape
            for key, value in model.state_dict().items()
        }
        component = Component(name, "model", _saved(model.config), shapes)
        yield component, draw_text_encoder(shapes, seed, name, numbers)

    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    yield (
        Component("unet", "diffusion_pytorch_model", _saved(unet), shapes),
        draw_unet(shapes, seed, unet.config.norm_num_groups, numbers),
    )
    shapes = {key: value.shape for key, value in vae.state_dict().items()}
    scaling = vae.config.scaling_factor
    yield (
        Component("vae", "diffusion_pytorch_model", _saved(vae), shapes),
        draw_vae(shapes, seed, scaling, numbers),
    )


def _small_dimensions(width: int, dtype: DType, text_2_layers: int) -> Dimensions:
    text, text_2 = _text_configs(dtype, text_2_layers)
    unet = _unet_config(width, text.hidden_size, text_2)
    return Dimensions(text, text_2, unet, _vae_config())


def text_config(dtype: DType, *, pad_token: str, **dimensions: Any) -> Any:
    """A CLIP text encoder's configuration, for the tokenizers that `small_tokenizer` writes."""
    tokens, _ = vocabulary()
    shared = {
        "bos_token_id": tokens[START],
        "eos_token_id": tokens[END],
        "pad_token_id": tokens[pad_token],
        "vocab_size": len(tokens),
        "max_position_embeddings": 77,
        "dtype": dtype,
    }
    return _make(CLIPTextConfig, **shared | dimensions)


def _text_configs(dtype: DType, text_2_layers: int) -> tuple[Any, Any]:
    first = text_config(
        dtype,
        pad_token=END,
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        projection_dim=32,
        hidden_act="quick_gelu",
        architectures=["CLIPTextModel"],
    )
    second = text_config(
        dtype,
        pad_token="!",
        num_hidden_layers=text_2_layers,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        projection_dim=64,
        hidden_act="gelu",
        architectures=["CLIPTextModelWithProjection"],
    )
    return first, second


def _unet_config(width: int, text_width: int, text_2: Any) -> dict[str, Any]:
    """SDXL's own arrangement (text and time added, attention only in the lower blocks), with few channels."""
    time_width = 8
    return {
        "sample_size": NATIVE_SIZE // VAE_SCALE_FACTOR,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32 * width, 64 * width, 64 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),  # diffusers' name for the number of heads
        "cross_attention_dim": text_width + text_2.hidden_size,
        "norm_num_groups": GROUPS,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": text_2.projection_dim + 6 * time_width,
    }


def _vae_config() -> dict[str, Any]:
    return {
        "sample_size": NATIVE_SIZE,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (16, 32, 32, 32),  # four levels: a scale factor of 8
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": GROUPS,
        "scaling_factor": 0.13025,
        "force_upcast": False,  # its activations stay small, so half precision is safe
    }


def _scheduler() -> Any:
    """SDXL base's own scheduler, "leading" and all: a few-step recipe has to override it, as with the real one."""
    return _make(
        EulerDiscreteScheduler,
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": _saved_version(),
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def lightning_recipe(dtype: DType, steps: tuple[int, ...], native_size: int) -> dict[str, Any]:
    """Euler trailing without guidance, at these step counts."""
    recipe = Recipe(
        scheduler=SchedulerRecipe(
            class_name="EulerDiscreteScheduler", config={"timestep_spacing": "trailing"}
        ),
        dtype=dtype,
        steps=steps,
        default_steps=steps[0],
        guidance_scale=0.0,
        guidance_free=True,
        native_size=native_size,
    )
    return recipe.model_dump(mode="json")


def _make(cls: Any, **arguments: Any) -> Any:
    """Construct a library object: the model libraries' constructors carry no types that a checker could hold to."""
    return cls(**arguments)


def _saved(model: Any) -> dict[str, Any]:
    """The configuration exactly as the library itself would save it."""
    config: dict[str, Any] = json.loads(model.to_json_string())
    return config


def _saved_version() -> str:
    version: str = json.loads(_scheduler().to_json_string())["_diffusers_version"]
    return version


def _write_weights(
    folder: Path, stem: str, tensors: dict[str, torch.Tensor], shard_bytes: int | None
) -> None:
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _shards(
    tensors: dict[str, torch.Tensor], shard_bytes: int | None
) -> list[dict[str, torch.Tensor]]:
    if shard_bytes is None:
        return [tensors]
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_small_sdxl(Path(sys.argv[1]))
