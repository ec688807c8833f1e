"""The names that latent diffusion's own code (Stable Diffusion 1, 2 and XL) gives to what diffusers calls otherwise.

Its UNet numbers its blocks in the order in which they run, input, middle and output; its VAE counts the decoder's
levels from the finest, and attends by convolutions of one pixel; and OpenCLIP joins what CLIP keeps apart.
Each function takes one component's tensors and its diffusers configuration, and returns the tensors renamed, without
the component's prefix. A name that has no place in the original is a ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, Any]

_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def unet(tensors: Tensors, config: Config) -> Tensors:
    """`UNet2DConditionModel` as `openaimodel.UNetModel`; names that begin with `input_blocks.`, `out.` and the like."""
    return {_unet_name(name, config): tensor for name, tensor in tensors.items()}


def _unet_name(name: str, config: Config) -> str:
    module, _, kind = name.rpartition(".")
    if module in _UNET_OUTSIDE:
        return f"{_UNET_OUTSIDE[module]}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        part, index, inner = found[1], int(found[2]), found[3]
        if part == "resnets":
            return f"middle_block.{2 * index}.{_known(inner, _UNET_RESNET, name)}.{kind}"
        return f"middle_block.{2 * index + 1}.{inner}.{kind}"
    found = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        module,
    )
    if found is None:
        raise no_place(name)
    way, level, part, index, inner = found[1], int(found[2]), found[3], int(found[4]), found[5]
    layers = config["layers_per_block"]
    # A level is layers + 1 blocks: downwards the last is the downsampler, and a first convolution goes before them all;
    # upwards there is one layer more, and the upsampler is in the last one's block.
    first = level * (layers + 1) + (1 if way == "down" else 0)
    blocks = "input_blocks" if way == "down" else "output_blocks"
    if part == "resnets":
        return f"{blocks}.{first + index}.0.{_known(inner, _UNET_RESNET, name)}.{kind}"
    if part == "attentions":
        return f"{blocks}.{first + index}.1.{inner}.{kind}"
    if part == "downsamplers":
        return f"{blocks}.{first + layers}.0.op.{kind}"
    after_attention = config["up_block_types"][level].startswith("CrossAttn")
    return f"{blocks}.{first + layers}.{2 if after_attention else 1}.conv.{kind}"


def autoencoder(tensors: Tensors, config: Config) -> Tensors:
    """`AutoencoderKL` as the original of the same name: `encoder.down.0.block.0.…`, `decoder.mid.attn_1.…`."""
    levels = len(config["block_out_channels"])
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        original = _vae_name(name, levels)
        is_pixel = ".mid.attn_1." in original and tensor.ndim == 2
        renamed[original] = tensor[:, :, None, None] if is_pixel else tensor
    return renamed


def _vae_name(name: str, levels: int) -> str:
    module, _, kind = name.rpartition(".")
    if re.fullmatch(r"(post_)?quant_conv|(en|de)coder\.conv_(in|out)", module):
        return name
    side, _, rest = module.partition(".")
    if rest == "conv_norm_out":
        return f"{side}.norm_out.{kind}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
        inner = _known(found[2], _VAE_RESNET, name)
        return f"{side}.mid.block_{int(found[1]) + 1}.{inner}.{kind}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        return f"{side}.mid.attn_1.{_known(found[1], _VAE_ATTENTION, name)}.{kind}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest):
        level = _vae_level(found[1], int(found[2]), levels)
        inner = _known(found[4], _VAE_RESNET, name)
        return f"{side}.{found[1]}.{level}.block.{found[3]}.{inner}.{kind}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(downsample|upsample)rs\.0\.conv", rest):
        level = _vae_level(found[1], int(found[2]), levels)
        return f"{side}.{found[1]}.{level}.{found[3]}.conv.{kind}"
    raise no_place(name)


def _vae_level(way: str, level: int, levels: int) -> int:
    return level if way == "down" else levels - 1 - level


def hugging_face_clip(tensors: Tensors, config: Config) -> Tensors:
    """A `CLIPTextModel` under the names it has always had: every one but the projection's begins with `text_model.`."""
    return {
        name
        if name.startswith(("text_model.", "text_projection."))
        else f"text_model.{name}": tensor
        for name, tensor in tensors.items()
    }


def open_clip(tensors: Tensors, config: Config) -> Tensors:
    """A CLIP text encoder as OpenCLIP's: queries, keys and values in one matrix, the projection the other way round."""
    renamed: Tensors = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in hugging_face_clip(tensors, config).items():
        if name in _OPEN_CLIP_OUTSIDE:
            renamed[_OPEN_CLIP_OUTSIDE[name]] = tensor
            continue
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
            continue
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None:
            raise no_place(name)
        block, inner, kind = f"transformer.resblocks.{found[1]}", found[2], found[3]
        if part := re.fullmatch(r"self_attn\.([qkv])_proj", inner):
            joined.setdefault(f"{block}.attn.in_proj_{kind}", {})[part[1]] = tensor
        else:
            renamed[f"{block}.{_known(inner, _OPEN_CLIP_LAYER, name)}.{kind}"] = tensor
    for name, parts in joined.items():
        renamed[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return renamed


def _known(part: str, names: Mapping[str, str], whole: str) -> str:
    if part not in names:
        raise no_place(whole)
    return names[part]


def no_place(name: str) -> ValueError:
    """What to raise for a tensor that the original layout has no name for."""
    return ValueError(f"The tensor {name} has no place in the layout of the original checkpoints.")
