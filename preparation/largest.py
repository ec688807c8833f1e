"""The largest number inside a VAE's decoder, found by running it in float32 on a few samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from diffusion.latents import unscaled

_EDGE = 24  # of a sample, in latents: 2 s and 200 MB for SDXL's decoder on two cores
_COARSE = 3  # of one without detail, before it is enlarged


def largest_number(vae: Any, on_share: Callable[[float], object] = lambda _share: None) -> float:
    """The largest magnitude among the decoder's weights and all that it computes from the samples; inf for NaN.

    `on_share` hears after each sample which share of them it was.
    """
    largest = _Largest()
    samples = _samples(vae.config.latent_channels)
    with torch.inference_mode():
        for module in filter(None, (vae.post_quant_conv, vae.decoder)):
            for weight in module.parameters():
                largest.look(weight)
        for sample in samples:
            with largest:
                vae.decode(unscaled(sample, vae.config), return_dict=False)
            on_share(1 / len(samples))
    return largest.found


class _Largest(TorchFunctionMode):
    """While it is on, looks at what every function of torch returns: sums inside a module too, which no hook sees.

    What a kernel keeps to itself, such as a norm's sums or attention's scores, is float32 there in any case.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.look(result)
        return result

    def look(self, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for part in value:
                self.look(part)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            low, high = (float(end) for end in torch.aminmax(value))
            magnitude = max(-low, high)
            self.found = math.inf if math.isnan(magnitude) else max(self.found, magnitude)


def _samples(channels: int) -> tuple[torch.Tensor, ...]:
    """Latents of about unit variance, as a denoiser leaves them, the same every time.

    Where a decoder overflows depends on the image, and bright areas are said to do it: so there is detail alone, areas
    alone, and areas in high contrast.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    detail = torch.randn(1, channels, _EDGE, _EDGE, generator=generator)
    coarse = torch.randn(1, channels, _COARSE, _COARSE, generator=generator)
    areas = torch.nn.functional.interpolate(coarse, size=(_EDGE, _EDGE), mode="bicubic")
    areas = areas / areas.std()
    return detail, areas, 2 * areas
