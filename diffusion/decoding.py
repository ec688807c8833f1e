"""Latents to a picture: the last part of stock pipelines' call, with a look at the result before it becomes bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from diffusion.errors import NonFiniteError
from diffusion.latents import unscaled


@dataclass(frozen=True)
class Decoded:
    """One image that may still be on its way from the device: `levels` are uint8, height x width x RGB.

    `finite` holds one boolean: whether every value was a number before rounding.
    """

    latents: torch.Tensor
    levels: torch.Tensor
    finite: torch.Tensor

    def picture(self, seed: int, vae_dtype: torch.dtype, is_sdxl: bool) -> Image.Image:
        """Once the device is done with it. Raises `NonFiniteError` for what would be a black image."""
        if not self.finite.item():
            raise NonFiniteError(_explain_non_finite(self.latents, vae_dtype, seed, is_sdxl))
        return Image.fromarray(self.levels.numpy())


def decode(vae: Any, latents: torch.Tensor) -> Decoded:
    """One image, `latents` of batch 1. On a card it returns at once, with copies to the host under way.

    Rounded to levels where it is: the host's memory gets a quarter of the bytes, and numpy no work.
    """
    pixels = vae.decode(unscaled(latents.to(vae.dtype), vae.config), return_dict=False)[0]
    finite = torch.isfinite(pixels).all()
    # As stock's image processor does it: halves in the VAE's dtype, then float32 from there on.
    between = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    levels = (between[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    if pixels.device.type != "cuda":
        return Decoded(latents, levels.contiguous(), finite)
    return Decoded(latents, _to_host(levels.contiguous()), _to_host(finite))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _explain_non_finite(
    latents: torch.Tensor, vae_dtype: torch.dtype, seed: int, is_sdxl: bool
) -> str:
    if not torch.isfinite(latents).all():
        return (
            f"Denoising seed {seed} gave latents with NaN or infinity (in {latents.dtype}), which would decode to a "
            "black image. Run the model in bfloat16 or float32, and check the weights it was published from."
        )
    fix = "Check the VAE the model was published with"
    if vae_dtype == torch.float16:
        other = (
            "with madebyollin/sdxl-vae-fp16-fix as its vae"
            if is_sdxl
            else "again with prepare_model.py, which looks for this"
        )
        fix = f"The VAE overflows in float16: run the model in bfloat16, or publish it {other}"
    return f"Decoding seed {seed} gave NaN or infinity (VAE in {vae_dtype}), which would be a black image. {fix}."
