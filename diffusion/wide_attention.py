"""Attention whose head is too wide for a card's fast kernels: as products of matrices, some rows at a time.

An AutoencoderKL attends once, in its middle, with one head of 512 numbers to all latents there are: 16,384 of them at
1024x1024. Flash attention and cuDNN's end at 256 numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

WIDEST_OF_FAST_KERNELS = 256

# Scores there are at once, in float32: 128 MiB of them.
MOST_SCORES = 2**25


def widen_attention(module: nn.Module) -> int:
    """Have the module's wide attention computed so; returns how many there are. What is not stock's stays as it is."""
    widened = 0
    for attention in module.modules():
        if isinstance(attention, Attention) and _is_wide(attention):
            attention.set_processor(WideAttention())
            widened += 1
    return widened


def _is_wide(attention: Any) -> bool:
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.heads == 1
        and attention.inner_dim > WIDEST_OF_FAST_KERNELS
        and not attention.is_cross_attention
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
    )


class WideAttention:
    """Stock's processor for images that attend to themselves, with another arithmetic in its middle."""

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        # Stock passes these to every processor, and warns of each that is not named here. None of them is asked for.
        encoder_hidden_states: torch.Tensor | None = None,  # noqa: ARG002
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002
        temb: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        image = hidden_states
        normed = image if attention.group_norm is None else attention.group_norm(image)
        rows = normed.flatten(2).transpose(1, 2)
        attended = attend(attention.to_q(rows), attention.to_k(rows), attention.to_v(rows))
        rows = attention.to_out[1](attention.to_out[0](attended))
        result = rows.transpose(1, 2).unflatten(2, image.shape[2:])
        if attention.residual_connection:
            result = result + image
        rescaled: torch.Tensor = result / attention.rescale_output_factor
        return rescaled


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax in float32, from scores that were never rounded to less; all of shape batch x rows x width."""
    at_once = max(1, MOST_SCORES // (len(key) * key.shape[1]))
    scale = query.shape[-1] ** -0.5
    keys = key.transpose(1, 2)
    pieces: Sequence[torch.Tensor] = query.split(at_once, dim=1)  # type: ignore[no-untyped-call]
    return torch.cat(
        [
            torch.bmm(
                (_product(some, keys) * scale).softmax(dim=-1).to(value.dtype),
                value,
            )
            for some in pieces
        ],
        dim=1,
    )


def _product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if rows.dtype == torch.float32:
        return torch.bmm(rows, columns)
    if rows.device.type == "cuda":
        return torch.bmm(rows, columns, out_dtype=torch.float32)
    return torch.bmm(rows.float(), columns.float())
