"""Linear layers in 8-bit floats, on cards whose tensor cores compute them: twice the rate, and a little of the quality.

Weights are rounded once, by row; inputs as they come, by row, so that one bright pixel takes no bits from the others
(dynamic row-wise scaling, as in https://arxiv.org/abs/2209.05433 and torch's own recipes). Results are in the
model's dtype. The weights stay where they are beside their rounded copies, for refreshes and for other models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from diffusion.fused import Joined, is_plain

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

# Below this the rounding costs more than the product gains, and tensor cores want multiples of 16.
SMALLEST_SIDE = 640
# Square ones are too small to gain at batch 1, and so is what reads the prompt, of 77 rows: on an H200 1024 rows times
# 1280x1280 took 8 us in bfloat16 and 9 in 8 bits, times 1280x10240 42 and 25.
LEAST_TIMES_AS_WIDE = 2

# An attention's layers: those that read the prompt, and those that may have been joined to one.
OF_PROMPT = ("to_k", "to_v")
OF_IMAGE = ("to_q", "to_k", "to_v")


def computes_float8(device: torch.device) -> bool:
    """Ada (8.9) and later: L4, L40S, H100 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def rounded_bytes(denoiser: nn.Module) -> int:
    """What the rounded copies take beside the weights, which may be on the meta device still and not fused."""
    sizes = [layer.weight.numel() for layer in _large_layers(denoiser, SMALLEST_SIDE)]
    for module in denoiser.modules():
        if isinstance(module, Attention) and not module.fused_projections and is_plain(module):
            rows, columns = module.to_q.weight.shape
            if not module.is_cross_attention and _is_large((3 * rows, columns), SMALLEST_SIDE):
                sizes.append(3 * rows * columns)
    return sum(sizes) * E4M3.itemsize


class Float8Layers:
    """The large linear layers of a denoiser's transformer blocks, switched to 8 bits and back.

    `refresh` after their weights were overwritten.
    """

    def __init__(self, denoiser: nn.Module, smallest_side: int = SMALLEST_SIDE) -> None:
        self._layers = [_Float8(layer) for layer in _large_layers(denoiser, smallest_side)]

    def __len__(self) -> int:
        return len(self._layers)

    def refresh(self) -> None:
        """Round the weights again, into the memory of their rounded copies: graphs that read there stay valid."""
        for layer in self._layers:
            layer.refresh()

    def switch(self, on: bool) -> None:
        """Compute in 8 bits from now on, or as before."""
        for layer in self._layers:
            layer.switch(on)


class _Float8:
    def __init__(self, layer: nn.Linear | Joined) -> None:
        self._layer = layer
        self._weight, self._scale = _rounded(layer.weight)

    def refresh(self) -> None:
        weight, scale = _rounded(self._layer.weight)
        self._weight.copy_(weight)
        self._scale.copy_(scale)

    def switch(self, on: bool) -> None:
        if isinstance(self._layer, Joined):
            self._layer.product = self if on else functional.linear
        elif on:
            self._layer.__dict__["forward"] = self._forward
        else:
            self._layer.__dict__.pop("forward", None)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self(hidden_states, self._layer.weight, self._layer.bias)

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows, scale = _rounded(hidden_states.reshape(-1, hidden_states.shape[-1]))
        # `functional.scaled_mm` is its public name; torch.compile cannot read that one before torch 2.13.
        product = torch._scaled_mm(  # noqa: SLF001
            rows,
            self._weight.t(),
            scale,
            self._scale.t(),
            bias=bias,
            out_dtype=hidden_states.dtype,
            use_fast_accum=True,
        )
        return product.view(*hidden_states.shape[:-1], len(weight))


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in 8 bits, and what to multiply it by, in float32."""
    # The largest of pieces first: a compiler keeps pieces of a row in registers, and would read a whole row twice.
    piece = _piece(rows.shape[-1])
    pieces = rows.abs().reshape(*rows.shape[:-1], -1, piece).amax(dim=-1)
    scale = pieces.amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def _piece(width: int) -> int:
    """The largest part of a row that divides it and that inductor reduces at once."""
    return next(part for part in range(min(width, 1024), 0, -1) if width % part == 0)


def _is_large(shape: Sequence[int], smallest_side: int) -> bool:
    narrow, wide = sorted(shape)
    return (
        narrow >= smallest_side
        and wide >= LEAST_TIMES_AS_WIDE * narrow
        and all(side % 16 == 0 for side in shape)
    )


def _large_layers(denoiser: nn.Module, smallest_side: int) -> Iterator[nn.Linear | Joined]:
    for name, module in denoiser.named_modules():
        if "transformer_blocks" not in name:
            continue
        joined: Any = getattr(module, "to_qkv", None)
        if isinstance(joined, Joined) and _is_large(joined.weight.shape, smallest_side):
            yield joined
        reads_prompt = getattr(module, "is_cross_attention", False)
        for part, layer in module.named_children():
            if type(layer) is not nn.Linear or not _is_large(layer.weight.shape, smallest_side):
                continue
            if part in OF_PROMPT if reads_prompt else part in OF_IMAGE and joined is not None:
                continue
            yield layer
