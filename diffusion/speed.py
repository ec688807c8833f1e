"""What is done to a model's parts so that a card computes them faster, and given up where the images suffer.

On a CPU nothing is, unless compiling is asked for: there the pixels are stock's, bit for bit.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.compiled import CompiledRegions, Compiling, Lesson
from diffusion.errors import CompileError, DiffusionError
from diffusion.float8 import Float8Layers, computes_float8
from diffusion.fused import fuse_projections

logger = logging.getLogger(__name__)

# 8-bit floats at less than this from the model's own arithmetic can be seen.
LOWEST_FLOAT8_DECIBELS = 30.0


class Speed:
    """The parts of one model, prepared for `device`.

    Args:
        float8: compute the large linear layers in 8-bit floats, where the card can.
        compiling: what is to run compiled once it was learned; None for nothing.
    """

    def __init__(
        self, device: torch.device, *, float8: bool = False, compiling: Compiling | None = None
    ) -> None:
        self._device = device
        self._wants_float8 = float8
        self._compiling = compiling
        self._regions: CompiledRegions | None = None
        self._denoiser: Any = None
        self._layers: Float8Layers | None = None
        if float8 and not computes_float8(device):
            logger.warning(
                "FLOAT8 is on, but %s does not compute 8-bit floats: it wants an Ada, Hopper or later card.",
                device,
            )
            self._wants_float8 = False

    def prepare(self, denoiser: Any, vae: Any) -> None:
        """Call it for every model that is about to serve: new parts are prepared, kept ones had new weights."""
        if self._device.type == "cuda":
            self._arrange(denoiser, vae)
        if self._compiling is not None:
            self._cover(denoiser, vae, self._compiling)

    @contextmanager
    def learning(self, size: tuple[int, int]) -> Iterator[Lesson]:
        """Inside, what runs at this size is compiled or taken from caches, where that was asked for."""
        if self._regions is None or self._compiling is None or size not in self._compiling.sizes:
            yield Lesson(learned=False)
            return
        with self._regions.learning() as lesson:
            yield lesson

    def _arrange(self, denoiser: Any, vae: Any) -> None:
        # Convolutions on tensor cores want the channels side by side; otherwise every one of them turns its input.
        vae.to(memory_format=torch.channels_last)
        if denoiser is not self._denoiser:
            denoiser.to(memory_format=torch.channels_last)
            fuse_projections(denoiser)
            self._denoiser = denoiser
            self._layers = Float8Layers(denoiser) if self._wants_float8 else None
        elif self._layers is not None:
            self._layers.refresh()

    def _cover(self, denoiser: Any, vae: Any, compiling: Compiling) -> None:
        try:
            if self._regions is None:
                self._regions = CompiledRegions(only_from_artifacts=compiling.only_from_artifacts)
            self._regions.cover(denoiser, vae)
        except CompileError as error:
            self._compiling = self._regions = None
            logger.warning("Serving without compiled code: %s", error)

    def try_float8(self, generate: Callable[[], Image.Image]) -> float | None:
        """Switch to 8-bit floats if an image stays near the one without; returns how near, in dB, if it was tried."""
        if self._layers is None:
            return None
        before = generate()
        self._layers.switch(on=True)
        try:
            decibels = peak_signal_to_noise(generate(), before)
        except (RuntimeError, DiffusionError) as error:
            self._layers.switch(on=False)
            self._layers = None
            reason = str(error).partition("\n")[0]
            logger.warning(
                "FLOAT8 is on, but stays off: it failed with this card and dtype (%s).", reason
            )
            return None
        if decibels < LOWEST_FLOAT8_DECIBELS:
            self._layers.switch(on=False)
            self._layers = None
            logger.warning(
                "FLOAT8 is on, but with this model its image is %.1f dB from the one without; below %.0f it stays off.",
                decibels,
                LOWEST_FLOAT8_DECIBELS,
            )
        else:
            logger.info("8-bit floats: %.1f dB from the image without.", decibels)
        return decibels


def peak_signal_to_noise(one: Image.Image, other: Image.Image) -> float:
    """In dB, for 8 bits a channel; infinite for equal images."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
