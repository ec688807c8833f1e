"""What of a model lies on a card, and how it decodes, so that it fits into the memory there is.

A card with room for everything gets everything. Less room: the decoder works in tiles. Less still: the text encoders
stay in the host's memory and come to the card only while they read a prompt.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion.float8 import rounded_bytes

logger = logging.getLogger(__name__)

GIB = 2**30

# What the decoder's last stage holds at once, in multiples of its narrowest layer at the image's full size: what comes
# in is twice as wide, and it, its normalised self and its activation are there together. cuDNN may want half of that.
DECODER_LAYERS_AT_ONCE = 6 * 1.5

# Of the denoiser in one pass, for every latent and row. In half precision were counted: 10 KiB for SDXL, 11 for SD 3.5
# Medium, 16 for SD 1.5, SD 2.1 and SD 3.5 Large.
DENOISER_BYTES_PER_LATENT = 18 * 1024

# Fragments, graphs' own memory, and whatever else runs beside.
MARGIN = 0.4 * GIB

TILE = 512  # pixels


@dataclass(frozen=True)
class Needs:
    """Bytes. `working` is the most that a request takes beside the weights, with and without tiles."""

    text: int
    others: int
    denoising: int
    decoding: int
    decoding_tiles: int

    def on_card(self, fit: "Fit") -> float:
        """What the card needs to have free for this, before the weights are there."""
        decoding = self.decoding_tiles if fit.tiles else self.decoding
        if fit.text_on_host:
            # The encoders are there only while the others do nothing.
            return self.others + max(self.text, self.denoising, decoding) + MARGIN
        return self.others + self.text + max(self.denoising, decoding) + MARGIN


@dataclass(frozen=True)
class Fit:
    """How a model is laid out."""

    tiles: bool = False
    text_on_host: bool = False

    def __str__(self) -> str:
        decoder = "the decoder works in tiles" if self.tiles else "the decoder takes images whole"
        text = "the text encoders stay in host memory" if self.text_on_host else ""
        return " and ".join(filter(None, (text, decoder)))


# From the fastest to the smallest.
FITS = (Fit(), Fit(tiles=True), Fit(text_on_host=True), Fit(tiles=True, text_on_host=True))


def choose_fit(free: int, needs: Needs) -> Fit:
    """The fastest layout that fits into `free` bytes, and the smallest one if none does. Logs what it costs."""
    chosen = next((fit for fit in FITS if needs.on_card(fit) <= free), None)
    if chosen is None:
        logger.warning(
            "%.1f GiB of the card are free, and this model needs about %.1f even with its text encoders in host "
            "memory and its decoder in tiles: large images may fail. Give it a card with more memory.",
            free / GIB,
            needs.on_card(FITS[-1]) / GIB,
        )
        return FITS[-1]
    if chosen != FITS[0]:
        logger.info(
            "%.1f GiB of the card are free, and this model would take about %.1f: %s.",
            free / GIB,
            needs.on_card(FITS[0]) / GIB,
            chosen,
        )
    return chosen


def needs_of(
    modules: Mapping[str, nn.Module],
    item_bytes: Mapping[str, int],
    denoiser: str,
    native_size: int,
    *,
    guided: bool,
    float8: bool = False,
) -> Needs:
    """Count the modules, which may be on the meta device, and estimate what a request at `native_size` takes.

    Args:
        item_bytes: of one number, by module.
        denoiser: its name among the modules; "vae" is the decoder's, and all others read text.
        float8: whether the denoiser's large layers have rounded copies beside them.
    """
    sizes = {
        name: sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
        * item_bytes[name]
        for name, module in modules.items()
    }
    resident = {denoiser, "vae"}
    vae: Any = modules["vae"].config
    scale = _pixels_per_latent(vae)
    per_pixel = DECODER_LAYERS_AT_ONCE * min(vae.block_out_channels) * item_bytes["vae"]
    latents = (native_size // scale) ** 2
    return Needs(
        text=sum(size for name, size in sizes.items() if name not in resident),
        others=sum(size for name, size in sizes.items() if name in resident)
        + (rounded_bytes(modules[denoiser]) if float8 else 0),
        denoising=int(
            latents * DENOISER_BYTES_PER_LATENT * (2 if guided else 1) * item_bytes[denoiser] / 2
        ),
        decoding=int(native_size**2 * per_pixel),
        decoding_tiles=int(min(native_size, TILE) ** 2 * per_pixel),
    )


def decode_in_tiles(vae: Any) -> None:
    """Have stock's own tiling begin where one tile ends; by default it begins beyond the native size."""
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // _pixels_per_latent(vae.config)


def _pixels_per_latent(vae_config: Any) -> int:
    """Along a side: every level of an AutoencoderKL but the last halves it, whatever its latents' channels."""
    return int(2 ** (len(vae_config.block_out_channels) - 1))


@contextmanager
def visiting(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on `device` for a while. Those that lie there already are left alone.

    They come back to the memory they left, so nothing is copied on the way back.
    """
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for module in modules:
            first = next(module.parameters(), None)
            if first is not None and first.device == device:
                continue  # a module is moved whole, and this is asked for every prompt
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device != device:
                    moved.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in moved:
            tensor.data = home
