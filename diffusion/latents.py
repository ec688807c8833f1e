"""Between a denoiser's latents, of about unit variance, and those that its VAE decodes. Imports torch alone."""

from typing import Any

import torch


def unscaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """What the VAE of `config` decodes; shape (images, channels, height, width), before and after.

    In the order stock diffusers computes it, so that the rounding is the same.
    """
    mean, std = config.latents_mean, config.latents_std
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape) / config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / config.scaling_factor
    if config.shift_factor is not None:
        latents = latents + config.shift_factor
    return latents
