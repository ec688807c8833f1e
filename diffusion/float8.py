"""Linear layers in 8-bit floats, on cards whose tensor cores compute them: twice the rate, and a little of the quality.

Weights are rounded once, by row; inputs as they come, by row, so that one bright pixel takes no bits from the others
(dynamic row-wise scaling, as in https://arxiv.org/abs/2209.05433 and torch's own recipes). Results are in the
model's dtype. The weights stay where they are beside their rounded copies, for refreshes and for other models.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import ScalingType

from diffusion.fused import Joined

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

# Below this the rounding costs more than the product gains, and tensor cores want multiples of 16.
SMALLEST_SIDE = 640


def computes_float8(device: torch.device) -> bool:
    """Ada (8.9) and later: L4, L40S, H100 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def rounded_bytes(denoiser: nn.Module) -> int:
    """What the rounded copies take beside the weights, which may be on the meta device still."""
    layers = _large_layers(denoiser, SMALLEST_SIDE)
    return sum(layer.weight.numel() for layer in layers) * E4M3.itemsize


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
        product = functional.scaled_mm(
            rows,
            self._weight.t(),
            scale,
            ScalingType.RowWise,
            self._scale.t(),
            ScalingType.RowWise,
            output_dtype=hidden_states.dtype,
        )
        if bias is not None:
            product = product + bias
        return product.view(*hidden_states.shape[:-1], len(weight))


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in 8 bits, and what to multiply it by, in float32."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def _large_layers(denoiser: nn.Module, smallest_side: int) -> Iterator[nn.Linear | Joined]:
    def large(weight: torch.Tensor) -> bool:
        return min(weight.shape) >= smallest_side and all(side % 16 == 0 for side in weight.shape)

    for name, module in denoiser.named_modules():
        if "transformer_blocks" not in name:
            continue
        joined: Any = [getattr(module, part, None) for part in ("to_qkv", "to_kv")]
        yield from (layer for layer in joined if isinstance(layer, Joined) and large(layer.weight))
        replaced = getattr(module, "fused_projections", False)
        for part, layer in module.named_children():
            within = replaced and part in _fused_parts(module)
            if type(layer) is nn.Linear and not within and large(layer.weight):
                yield layer


def _fused_parts(attention: Any) -> tuple[str, ...]:
    return ("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v")
