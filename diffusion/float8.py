"""Linear layers in 8-bit floats, on cards whose tensor cores compute them: twice the rate, and a little of the quality.

Weights are rounded once. Inputs whose bounds are known from the weights before them (bounds.py) are scaled by powers
of two, one for each feature, by which the weight that meets it is multiplied in turn: nobody has to look for the
largest number, a feature that might become some thousand times as large takes nothing from the others, and neither
company nor prompt changes how an image is rounded. Other inputs are scaled row by row as they come, so that one bright
pixel takes nothing from the others (dynamic row-wise scaling, as in https://arxiv.org/abs/2209.05433 and torch's own
recipes). Results are in the model's dtype. The weights stay where they are beside their rounded copies, for refreshes
and for other models.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from diffusion.bounds import Bounds, Linear, input_bounds
from diffusion.fused import Joined, is_plain

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

# Below this the rounding costs more than the product gains, and tensor cores want multiples of 16.
SMALLEST_SIDE = 640
# Square ones gain little at batch 1, and what reads the prompt, of 77 rows, nothing: on an H200 1024 rows times
# 1280x1280 took 7.5 us in bfloat16 and 6.1 in 8 bits, times 1280x10240 44 and 29, times 5120x1280 20 and 12.
LEAST_TIMES_AS_WIDE = 2

# What is bounded for exact arithmetic may have been rounded to 8 bits on its way: a gate's two factors, each of them of
# two numbers that are about a sixteenth off at most. Where that is not enough, the largest is cut off.
ROUNDED_BEFORE = (17 / 16) ** 4
# How far the largest feature's factor may be above any other's: weights have that room in 8 bits, and not much more.
MOST_APART = 1024.0

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
        bounds = input_bounds(denoiser)
        self._layers = [
            _Bounded(layer, bounds[layer]) if layer in bounds else _ByRows(layer)
            for layer in _large_layers(denoiser, smallest_side)
        ]

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


class _Float8(ABC):
    """Stands in for one layer's product. Its tensors keep their places, where graphs and compiled code read them."""

    def __init__(self, layer: Linear) -> None:
        self._layer = layer
        self._tensors = self._made()

    def refresh(self) -> None:
        for mine, made in zip(self._tensors, self._made(), strict=True):
            mine.copy_(made)

    def switch(self, on: bool) -> None:
        if isinstance(self._layer, Joined):
            self._layer.product = self if on else functional.linear
        elif on:
            self._layer.__dict__["forward"] = self._forward
        else:
            self._layer.__dict__.pop("forward", None)

    @property
    def rounded(self) -> torch.Tensor:
        """The weight in 8 bits."""
        return self._tensors[0]

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self(hidden_states, self._layer.weight, self._layer.bias)

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows, scale, scale_of_weight = self._prepared(hidden_states.flatten(0, -2))
        # `functional.scaled_mm` is its public name; torch.compile cannot read that one before torch 2.13.
        product = torch._scaled_mm(  # noqa: SLF001
            rows,
            self.rounded.t(),
            scale,
            scale_of_weight,
            bias=bias,
            out_dtype=hidden_states.dtype,
            use_fast_accum=True,
        )
        return product.view(*hidden_states.shape[:-1], len(weight))

    @abstractmethod
    def _made(self) -> tuple[torch.Tensor, ...]:
        """The weight in 8 bits first, and what belongs to it."""

    @abstractmethod
    def _prepared(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows in 8 bits, what to multiply them by, and what to multiply the weight by, in float32."""


class _Bounded(_Float8):
    """A power of two for each input feature, and one for the weight: they change a float's exponent alone."""

    def __init__(self, layer: Linear, bounds: Bounds) -> None:
        self._bounds = bounds
        super().__init__(layer)

    def _made(self) -> tuple[torch.Tensor, ...]:
        bounds = ROUNDED_BEFORE * self._bounds()
        of_inputs = _powers_of_two(bounds.clamp(min=bounds.amax() / MOST_APART))
        weight = self._layer.weight.float() * of_inputs
        of_weight = _powers_of_two(weight.abs().amax())
        # One over a power of two is exact, in bfloat16 too, and a product takes a card less time than a quotient.
        per_input = (1 / of_inputs).bfloat16()
        return _in_8_bits(weight / of_weight), of_weight, per_input, torch.ones_like(of_weight)

    def _prepared(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, of_weight, per_input, one = self._tensors
        return _in_8_bits(rows.float() * per_input), one, of_weight


class _ByRows(_Float8):
    """A scale for each row of the inputs, and for each of the weight."""

    def _made(self) -> tuple[torch.Tensor, ...]:
        return _rounded_by_rows(self._layer.weight)

    def _prepared(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, of_weight = self._tensors
        rounded, scale = _rounded_by_rows(rows)
        return rounded, scale, of_weight.t()


def _in_8_bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-LARGEST, LARGEST).to(E4M3)


def _powers_of_two(largest: torch.Tensor) -> torch.Tensor:
    """What to divide numbers by for them to fit into 8 bits, each up to its largest: at most twice what is needed."""
    ratio = largest.float().clamp(min=1e-30) / LARGEST
    return ratio / torch.frexp(ratio).mantissa


def _rounded_by_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in 8 bits, and what to multiply it by, in float32."""
    # The largest of pieces first: a compiler keeps pieces of a row in registers, and would read a whole row twice.
    piece = _piece(rows.shape[-1])
    pieces = rows.abs().reshape(*rows.shape[:-1], -1, piece).amax(dim=-1)
    scale = pieces.amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return _in_8_bits(rows.float() / scale), scale


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


def _large_layers(denoiser: nn.Module, smallest_side: int) -> Iterator[Linear]:
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
