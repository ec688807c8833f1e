"""Attention's projections of one input, as one product of matrices, without a second copy of their weights.

diffusers' own `fuse_qkv_projections` copies them: twice the memory, and a refresh would overwrite the half that nobody
reads. Here the parts become views of the whole, so whoever writes to them writes to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn
from torch.nn import functional


class Joined:
    """Several linear layers of one input as one. No module of its own: its weights are theirs, in their state dict."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.weight = _joined([part.weight for part in parts])
        # Typed as always there; a layer without one has None.
        biases: list[Any] = [part.bias for part in parts]
        self.bias = None if any(bias is None for bias in biases) else _joined(biases)
        # What multiplies; another one may do it in another arithmetic.
        self.product: Callable[..., torch.Tensor] = functional.linear

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.product(hidden_states, self.weight, self.bias)


def fuse_projections(denoiser: Any) -> int:
    """Fuse query, key and value of self-attention, key and value of cross-attention; returns how many it fused.

    Attention that is not stock's plain one stays as it is.
    """
    fused = 0
    for attention in denoiser.modules():
        if not isinstance(attention, Attention) or not is_plain(attention):
            continue
        if attention.is_cross_attention:
            attention.to_kv = Joined([attention.to_k, attention.to_v])
        else:
            attention.to_qkv = Joined([attention.to_q, attention.to_k, attention.to_v])
        attention.fused_projections = True
        attention.set_processor(FusedAttnProcessor2_0())
        fused += 1
    return fused


def is_plain(attention: Any) -> bool:
    """Whether it is stock's attention with nothing added, which is what `fuse_projections` takes."""
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.to_k is not None
        and attention.add_k_proj is None
    )


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts one after another in new memory, which they become views of."""
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):  # type: ignore[no-untyped-call]
        part.data = view
    return whole
