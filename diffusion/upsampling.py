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

# By row or column: the weights of a window of 3 that fall on the first and the second of the 2 pixels it sees. It lies
# on the first or on the second pixel of a doubled one.
_SEEN = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


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
        kernels, biases = _kernels(self.conv)
        self.kernels.copy_(kernels)
        if self.biases is not None:
            self.biases.copy_(biases)


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
            kernels, biases = _kernels(part.conv)
            # Beside the weights, and in no state dict: a new version has none of them.
            vars(part).update(kernels=kernels, biases=biases)
            part.__class__ = SubPixelUpsample
            found += 1
    return found


def convolve_after_doubling(module: nn.Module) -> None:
    """Have the module's upsampling be stock's again."""
    for part in module.modules():
        if type(part) is SubPixelUpsample:
            part.__class__ = Upsample2D
            del part.kernels, part.biases


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


@torch.no_grad()
def _kernels(conv: Any) -> tuple[torch.Tensor, Any]:
    """Summed in float32, and rounded once."""
    weight = conv.weight
    seen = torch.tensor(_SEEN, dtype=torch.float32, device=weight.device)
    kernels = torch.einsum("ayu,bxv,oiuv->aboiyx", seen, seen, weight.float()).flatten(0, 2)
    layout = (
        torch.channels_last
        if weight.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    biases = None if conv.bias is None else conv.bias.repeat(4)
    return kernels.to(weight.dtype).contiguous(memory_format=layout), biases


def _side_by_side(pixels: torch.Tensor) -> torch.Tensor:
    """From batch x 4 channels x (height + 1) x (width + 1) to batch x channels x 2 height x 2 width."""
    count, _, height, width = pixels.shape
    # A window before the image and one behind it: the first pixels begin with one, and the second with the other.
    upper_left, upper_right, lower_left, lower_right = pixels.permute(0, 2, 3, 1).chunk(4, dim=3)
    upper = torch.stack((upper_left[:, :-1, :-1], upper_right[:, :-1, 1:]), dim=3)
    lower = torch.stack((lower_left[:, 1:, :-1], lower_right[:, 1:, 1:]), dim=3)
    image = torch.stack((upper, lower), dim=2)
    return image.reshape(count, 2 * (height - 1), 2 * (width - 1), -1).permute(0, 3, 1, 2)
