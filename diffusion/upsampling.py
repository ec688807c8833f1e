"""Convolutions behind a doubling of the image, computed from the image before it: 4 products where there were 9.

In an image whose pixels were doubled a window of 3x3 sees only 2x2 different ones, some of them through several
weights, whose sum is one weight. There are four ways in which it can lie, so four kernels of 2x2 give a pixel each (the
sub-pixel convolution of https://arxiv.org/abs/1609.05158). An SDXL decoder does a quarter of its products there.
"""

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

# By row or column: which weights of a window of 3 fall on the first and the second of the 2 pixels that it sees, where
# its middle is the first pixel of a doubled one, and where it is the second.
_SEEN = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
# Of a doubled pixel, as kernels have them: by row and column.
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


class SubPixelUpsample(Upsample2D):  # type: ignore[misc]
    """Stock's nearest doubling and 3x3 convolution. What it is asked beside that is stock's own work."""

    kernels: torch.Tensor
    """4 x output channels, input channels, 2, 2: of the upper left, upper right, lower left and lower right pixels."""
    biases: torch.Tensor | None

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_size: Any = None,
        *arguments: Any,
        **named: Any,
    ) -> torch.Tensor:
        if output_size is not None:
            result: torch.Tensor = super().forward(hidden_states, output_size, *arguments, **named)
            return result
        pixels = functional.conv2d(hidden_states, self.kernels, self.biases, padding=1)
        return _side_by_side(pixels)

    def refresh(self) -> None:
        """After the weights were overwritten. Graphs that read these stay valid."""
        _sum(self.conv.weight, self.kernels)
        if self.biases is not None:
            self.biases.copy_(self.conv.bias.repeat(4))


def convolve_before_doubling(module: nn.Module) -> int:
    """Have the module's upsampling computed so, as its weights are now; returns how much of it there is.

    Call it again after they were overwritten. What is not stock's plain one stays as it is.
    """
    found = 0
    for part in module.modules():
        if type(part) is SubPixelUpsample:
            part.refresh()
            found += 1
        elif type(part) is Upsample2D and _is_plain(part):
            _convert(part)
            found += 1
    return found


def convolve_after_doubling(module: nn.Module) -> int:
    """Have the module's upsampling be stock's again; returns how much of it was not."""
    found = [part for part in module.modules() if type(part) is SubPixelUpsample]
    for part in found:
        part.__class__ = Upsample2D
        del part.kernels, part.biases
    return len(found)


def _is_plain(part: Any) -> bool:
    conv = getattr(part, "conv", None)
    return (
        type(conv) is nn.Conv2d
        and part.norm is None
        and part.interpolate
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
    )


# Tensors that are made in inference mode can be written to in no other.
@torch.inference_mode(False)
@torch.no_grad()
def _convert(part: Any) -> None:
    weight, bias = part.conv.weight, part.conv.bias
    wide, *others = weight.shape[:2]
    side_by_side = weight.is_contiguous(memory_format=torch.channels_last)
    kernels = torch.empty(
        (4 * wide, *others, 2, 2),
        dtype=weight.dtype,
        device=weight.device,
        memory_format=torch.channels_last if side_by_side else torch.contiguous_format,
    )
    _sum(weight, kernels)
    # Beside the weights, and in no state dict: a new version has none of them.
    vars(part).update(kernels=kernels, biases=None if bias is None else bias.detach().repeat(4))
    part.__class__ = SubPixelUpsample


@torch.no_grad()
def _sum(weight: torch.Tensor, kernels: torch.Tensor) -> None:
    """In float32, and rounded once; with memory for one weight of a kernel at a time."""
    for kernel, (row, column) in zip(kernels.chunk(4), _CORNERS, strict=True):
        for y, x in _CORNERS:
            seen = weight[:, :, _SEEN[row][y], _SEEN[column][x]]
            kernel[:, :, y, x] = seen.float().sum((2, 3))


def _side_by_side(pixels: torch.Tensor) -> torch.Tensor:
    """From batch x 4 channels x (height + 1) x (width + 1) to batch x channels x 2 height x 2 width."""
    count, channels, height, width = (pixels.shape[0], pixels.shape[1] // 4, *pixels.shape[2:])
    # One window more than there are pixels: the first of two begin with the first one, the second with the one after.
    corners = [
        corner[:, :, y : y + height - 1, x : x + width - 1]
        for corner, (y, x) in zip(pixels.chunk(4, dim=1), _CORNERS, strict=True)
    ]
    shape = (count, channels, 2 * (height - 1), 2 * (width - 1))
    # Of this call, and not of whatever other threads compile meanwhile, as `is_compiling` is.
    if torch.compiler.is_dynamo_compiling():
        lying = [corner.permute(0, 2, 3, 1) for corner in corners]
        rows = [torch.stack(pair, dim=3) for pair in (lying[:2], lying[2:])]
        image = torch.stack(rows, dim=2).reshape(count, *shape[2:], channels)
        return image.permute(0, 3, 1, 2)
    side_by_side = pixels.is_contiguous(memory_format=torch.channels_last)
    image = torch.empty(
        shape,
        dtype=pixels.dtype,
        device=pixels.device,
        memory_format=torch.channels_last if side_by_side else torch.contiguous_format,
    )
    for corner, (y, x) in zip(corners, _CORNERS, strict=True):
        image[:, :, y::2, x::2] = corner
    return image
