"""The names that Stable Diffusion 3's own code gives to what diffusers calls otherwise.

Its transformer keeps what belongs to the picture (`x_block`) apart from what belongs to the prompt (`context_block`),
joins queries, keys and values in one matrix, and where a block only modulates it shifts before it scales. Each function
takes one component's tensors and its diffusers configuration, and returns the tensors renamed, without the component's
prefix. A name that has no place in the original is a ValueError.
"""

from __future__ import annotations

import re

import torch

from tests.support.original_ldm import Config, Tensors, hugging_face_clip, no_place

_OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_JOINED = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}
_PARTS = {
    part.format(letter): (whole, letter) for part, whole in _JOINED.items() for letter in "qkv"
}


def transformer(tensors: Tensors, config: Config) -> Tensors:
    """`SD3Transformer2DModel` as `mmdit.MMDiT`."""
    last = config["num_layers"] - 1
    # In the last block nothing reads the prompt any more: its modulation is the one of a final layer.
    final = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    renamed: Tensors = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = tensor
            continue
        module, _, kind = name.rpartition(".")
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if found and found[2] in _PARTS:
            whole, letter = _PARTS[found[2]]
            joined.setdefault(f"joint_blocks.{found[1]}.{whole}.{kind}", {})[letter] = tensor
            continue
        if found and found[2] in _BLOCK:
            original = f"joint_blocks.{found[1]}.{_BLOCK[found[2]]}"
        elif module in _OUTSIDE:
            original = _OUTSIDE[module]
        else:
            raise no_place(name)
        renamed[f"{original}.{kind}"] = _shift_first(tensor) if module in final else tensor
    for name, parts in joined.items():
        renamed[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return renamed


def _shift_first(tensor: torch.Tensor) -> torch.Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def clip_l(tensors: Tensors, config: Config) -> Tensors:
    """The smaller CLIP, whose projection the original does without: what is published for diffusers is the identity."""
    renamed = hugging_face_clip(tensors, config)
    projection = renamed.pop("text_projection.weight")
    if not torch.equal(projection, torch.eye(len(projection), dtype=projection.dtype)):
        raise ValueError(
            "The projection of Stable Diffusion 3's first text encoder has no place in the layout of the original "
            "checkpoints unless it is the identity."
        )
    return renamed


def t5(tensors: Tensors, config: Config) -> Tensors:
    """The T5 encoder, which the original holds with its embedding under both of the names that it has there."""
    return {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
