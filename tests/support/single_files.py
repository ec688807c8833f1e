"""Writes a small diffusers folder's weights as the single file that the model's authors would have published.

What Civitai and the authors' own repositories hold: one `.safetensors` file, UNet (or transformer), VAE and text
encoders side by side under the names of the original code. Which names they are is the business of `original_ldm` and
`original_sd3`; this module knows where each component's names begin, and reads and writes files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.original_ldm import autoencoder, hugging_face_clip, open_clip, unet
from tests.support.original_sd3 import clip_l, t5, transformer

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, Any]
Rename = Callable[[Tensors, Config], Tensors]
Layout = Mapping[str, tuple[str, Rename]]  # component: its names' prefix, and what comes after it

_NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})

_SDXL: Layout = {
    "unet": ("model.diffusion_model.", unet),
    "vae": ("first_stage_model.", autoencoder),
    "text_encoder": ("conditioner.embedders.0.transformer.", hugging_face_clip),
    "text_encoder_2": ("conditioner.embedders.1.model.", open_clip),
}
_SD1: Layout = {
    "unet": ("model.diffusion_model.", unet),
    "vae": ("first_stage_model.", autoencoder),
    "text_encoder": ("cond_stage_model.transformer.", hugging_face_clip),
}
_SD2: Layout = {**_SD1, "text_encoder": ("cond_stage_model.model.", open_clip)}
_SD3: Layout = {
    "transformer": ("model.diffusion_model.", transformer),
    "vae": ("first_stage_model.", autoencoder),
    "text_encoder": ("text_encoders.clip_l.transformer.", clip_l),
    "text_encoder_2": ("text_encoders.clip_g.transformer.", hugging_face_clip),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.", t5),
}


def write_single_file(
    folder: Path,
    target: Path,
    *,
    without: Collection[str] = (),
    dtype: torch.dtype | None = None,
    extra: Mapping[str, torch.Tensor] = _NOTHING,
) -> Path:
    """Write the weights of a diffusers folder as one safetensors file under the authors' names, and return its path.

    Args:
        folder: a pipeline saved by diffusers as safetensors, sharded or not; its `model_index.json` says which.
        without: components, by their names there, that the file leaves out.
        dtype: what the file holds; None leaves every tensor as it is.
        extra: further tensors, under their names in the file, written as they are.

    Raises:
        ValueError: the pipeline is of a family whose original names are not known here, `without` names something that
            is none of its components, or one of its tensors has no place in the original layout.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    layout = _layout(folder, index["_class_name"])
    if unknown := set(without) - set(layout):
        raise ValueError(
            f"{folder} has no component {sorted(unknown)} to leave out of {target}: choose from {sorted(layout)}."
        )
    tensors: Tensors = {}
    for component, (prefix, rename) in layout.items():
        if component in without or index.get(component, [None])[0] is None:
            continue
        part = folder / component
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        renamed = rename(read_weights(part), config)
        tensors |= {prefix + name: _cast(tensor, dtype) for name, tensor in renamed.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **extra}, target, metadata={"format": "pt"})
    return target


def read_weights(folder: Path) -> Tensors:
    """Every tensor of a component's folder, its shards taken together."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    return tensors


def _layout(folder: Path, pipeline: str) -> Layout:
    if pipeline == "StableDiffusionXLPipeline":
        return _SDXL
    if pipeline == "StableDiffusionPipeline":
        # Both versions are this one pipeline. Version 2 brought OpenCLIP and, with it, linear projections.
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return _SD2 if config["use_linear_projection"] else _SD1
    if pipeline == "StableDiffusion3Pipeline":
        return _SD3
    raise ValueError(
        f"{folder} is a {pipeline}, and how its authors name its tensors is not known here."
    )


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    # contiguous: a file holds no views, such as a transposed matrix is
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()
