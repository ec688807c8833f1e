"""How large the inputs of a transformer block's linear layers can become, told from the weights before them.

What leaves a LayerNorm of width d has, before its own weight and bias, a length of at most the square root of d,
whatever went in: so what is made of it by the next layer has a bound that no prompt and no noise exceeds. It is a fact
about a model's weights, and the same on every machine.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from diffusion.fused import Joined

Linear = nn.Linear | Joined
Bounds = Callable[[], torch.Tensor]
"""One bound for each of the layer's input features, as the weights are now: float32, where they lie."""


def input_bounds(denoiser: nn.Module) -> dict[Linear, Bounds]:
    """Those of the linear layers of stock's plain blocks that read a norm's output, or that of a gate behind one.

    What reads something else is not among them: attention's results, a prompt, norms that follow the time.
    """
    return {
        layer: bounds
        for block in denoiser.modules()
        if _is_plain(block)
        for layer, bounds in _of_block(block)
    }


def _is_plain(block: Any) -> bool:
    return (
        type(block) is BasicTransformerBlock
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and all(_is_affine(norm) for norm in (block.norm1, block.norm3))
    )


def _is_affine(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and dict(norm.named_parameters()).keys() == {"weight", "bias"}


def _of_block(block: Any) -> Iterator[tuple[Linear, Bounds]]:
    attention = block.attn1
    if not attention.is_cross_attention:
        joined = getattr(attention, "to_qkv", None)
        parts = [joined] if joined else [attention.to_q, attention.to_k, attention.to_v]
        for part in parts:
            yield part, partial(of_norm, block.norm1)
    first, last = block.ff.net[0], block.ff.net[2]
    if type(first) is GEGLU:
        yield first.proj, partial(of_norm, block.norm3)
        yield last, partial(of_gate, block.norm3, first.proj)


def of_norm(norm: nn.LayerNorm) -> torch.Tensor:
    """Of the features that leave a LayerNorm."""
    return _length(norm) * norm.weight.float().abs() + norm.bias.float().abs()


def of_gate(norm: nn.LayerNorm, projection: nn.Linear) -> torch.Tensor:
    """Of the features of `h * gelu(g)`, where a projection of a norm's output is h and g side by side (GEGLU).

    gelu(g) is no further from 0 than g, and (a x)(b x) for no x of length r further than r² (|a| |b| + |a b|) / 2; h
    and g are such products, plus what the norm's bias and the projection's own add.
    """
    length, weight = _length(norm), projection.weight.float()
    added = weight @ norm.bias.float()
    if projection.bias is not None:
        added = added + projection.bias.float()
    values, gates = (weight * norm.weight.float()).chunk(2)
    added_values, added_gates = added.abs().chunk(2)
    of_values, of_gates = values.norm(dim=1), gates.norm(dim=1)
    together = length**2 * (of_values * of_gates + (values * gates).sum(dim=1).abs()) / 2
    beside = length * (added_values * of_gates + added_gates * of_values)
    bounds: torch.Tensor = together + beside + added_values * added_gates
    return bounds


def _length(norm: nn.LayerNorm) -> float:
    return float(norm.weight.numel() ** 0.5)
