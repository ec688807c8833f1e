"""Small pictures of latents on their way, made for a fraction of what the VAE costs.

A tiny VAE makes them where the model was published with one. Else each latent becomes one pixel, by the linear map that
comes nearest to what the model's own VAE does. That map is fitted here and not taken from anywhere: it fits finetunes
and replaced VAEs too, and decoding its few samples costs about as much as one small image.
"""

import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusion.device import ran_out_of_memory
from diffusion.latents import unscaled

logger = logging.getLogger(__name__)

EDGE = 256  # the longer one of a picture, in pixels, at most

# Colours come from large areas and edges from small ones, so samples are fields of noise from coarse to fine. For SDXL
# these eight are a fifteenth of the work of decoding one image of 1024x1024.
_SAMPLE_EDGE = 12  # in latents
_COARSENESS = (2, 3, 6, 12)
_SAMPLES_OF_EACH = 2


class Previews:
    """Makes pictures of one version's latents. For one thread at a time, under `torch.inference_mode`."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._vae: Any = pipeline.vae
        self._tiny: Any = getattr(pipeline, "preview_vae", None)
        self._map: torch.Tensor | None = None
        self._given_up = False

    def picture(self, latents: torch.Tensor) -> Image.Image | None:
        """The picture of one image's latents, shape (1, channels, height, width); None where none can be made.

        That is no reason for a generation to fail, whatever it is. It is logged, and what more memory would not mend
        is not tried again.
        """
        if self._given_up:
            return None
        try:
            pixels = self._mapped(latents) if self._tiny is None else self._decoded(latents)
            return _image(pixels)
        except Exception as error:  # noqa: BLE001
            full = isinstance(error, RuntimeError) and ran_out_of_memory(error)
            self._given_up = not full
            logger.warning(
                "No preview %s: making one failed (%s: %s). The images themselves are made as ever.",
                "of this step" if full else "from now on",
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return None

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        tiny = self._tiny
        scaled = latents.to(tiny.dtype) / tiny.config.scaling_factor + tiny.config.shift_factor
        pixels: torch.Tensor = tiny.decode(scaled, return_dict=False)[0]
        return pixels

    def _mapped(self, latents: torch.Tensor) -> torch.Tensor:
        if self._map is None:
            self._map = fit(self._vae).to(latents.device)
        return torch.einsum("nchw,cd->ndhw", latents.float(), self._map[:-1]) + self._map[-1].view(
            1, -1, 1, 1
        )


def fit(vae: Any) -> torch.Tensor:
    """The linear map from latents, as a denoiser leaves them, to RGB from -1 to 1; shape (channels + 1, 3).

    Its last row is added. By least squares over samples that `vae` decodes. Raises `ValueError` for a VAE that decodes
    to NaN or infinity.
    """
    latents = _samples(vae.config.latent_channels)
    colours = []
    for sample in latents.unbind():  # one by one: memory for a small image suffices
        scaled = unscaled(sample[None].to(vae.device, vae.dtype), vae.config)
        pixels = vae.decode(scaled, return_dict=False)[0].float()
        areas = torch.nn.functional.interpolate(
            pixels.clamp(-1, 1), size=sample.shape[-2:], mode="area"
        )
        colours.append(areas.cpu())
    wanted = torch.cat(colours).movedim(1, -1).flatten(0, -2)
    if not torch.isfinite(wanted).all():
        raise ValueError(f"the VAE in {vae.dtype} decodes to NaN or infinity")
    given = latents.movedim(1, -1).flatten(0, -2)
    given = torch.cat([given, torch.ones(len(given), 1)], dim=1)
    solution: torch.Tensor = torch.linalg.lstsq(given, wanted).solution
    return solution


def _samples(channels: int) -> torch.Tensor:
    """Latents of about unit variance, the same every time and without a look at the noise that images are made of."""
    generator = torch.Generator("cpu").manual_seed(0)
    fields = []
    for edge in _COARSENESS:
        coarse = torch.randn(_SAMPLES_OF_EACH, channels, edge, edge, generator=generator)
        field = torch.nn.functional.interpolate(
            coarse, size=(_SAMPLE_EDGE, _SAMPLE_EDGE), mode="bicubic"
        )
        fields.append(field / field.std())
    return torch.cat(fields)


def _image(pixels: torch.Tensor) -> Image.Image:
    """RGB from -1 to 1, shape (1, 3, height, width), made small before it leaves its device."""
    height, width = pixels.shape[-2:]
    shrink = min(1.0, EDGE / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    small = torch.nn.functional.interpolate(pixels.float(), size=size, mode="area")
    # Latents that overflowed are the engine's to report, at the end.
    levels = small.nan_to_num(0.0).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels[0].movedim(0, -1).cpu().numpy())
