"""What is done to a model's parts so that a card computes them faster, and given up where the images suffer.

On a CPU only what leaves every bit as it is, unless compiling is asked for: there the pixels are stock's.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.compiled import CompiledRegions, Compiling, Lesson
from diffusion.float8 import Float8Layers, computes_float8
from diffusion.fused import fuse_projections
from diffusion.group_norms import spread_group_norms
from diffusion.layout import lay_channels_side_by_side
from diffusion.prompt_keys import make_keys_once
from diffusion.rehearsal import Rehearsal
from diffusion.text_graphs import TextGraphs
from diffusion.upsampling import convolve_after_doubling, convolve_before_doubling
from diffusion.wide_attention import widen_attention

logger = logging.getLogger(__name__)

# 8-bit floats at less than this from the model's own arithmetic can be seen.
LOWEST_FLOAT8_DECIBELS = 30.0


class Speed:
    """The parts of one model, prepared for `device`.

    Args:
        float8: compute the large linear layers in 8-bit floats, where the card can.
        compiling: what is to run compiled once it was learned; None for nothing.
        forget_graphs: called when passes compute in another way from now on, which graphs that were recorded do not.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        float8: bool = False,
        compiling: Compiling | None = None,
        forget_graphs: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._wants_float8 = float8
        self._compiling = compiling
        self._forget_graphs = forget_graphs
        self._text_graphs = TextGraphs(device)
        self._regions: CompiledRegions | None = None
        self._denoiser: Any = None
        self._layers: Float8Layers | None = None
        self._float8_is_on = False
        self._doubles_first = False
        if float8 and not computes_float8(device):
            logger.warning(
                "FLOAT8 is on, but %s does not compute 8-bit floats: it wants an Ada, Hopper or later card.",
                device,
            )
            self._wants_float8 = False

    def prepare(self, denoiser: Any, vae: Any, text_encoders: Sequence[Any] = ()) -> None:
        """Call it for every model that is about to serve: new parts are prepared, kept ones had new weights.

        Never raises: what fails is left out, with a line in the log.
        """
        on_card = self._device.type == "cuda"
        self._attempt("Keys of prompts", partial(make_keys_once, denoiser, joined=on_card))
        if on_card:
            self._attempt("Channels side by side", partial(lay_channels_side_by_side, vae))
            self._attempt("Group norms", partial(spread_group_norms, vae))
            self._attempt("Wide attention", partial(widen_attention, vae))
            self._attempt("Graphs of prompts", partial(self._text_graphs.cover, text_encoders))
            if denoiser is not self._denoiser:
                self._take_up(denoiser)
            elif self._layers is not None and not self._attempt("FLOAT8", self._layers.refresh):
                self._give_float8_up()  # some copies are of the old weights
            self._convolve_before_doubling(denoiser, vae)
        if self._compiling is not None:
            self._cover(denoiser, vae, self._compiling)

    def forget_graphs(self) -> None:
        """Of the denoiser's passes and of prompts: the thread that has recorded them ends."""
        self._forget_graphs()
        self._text_graphs.forget()

    @contextmanager
    def learning(self, size: tuple[int, int]) -> Iterator[Lesson]:
        """Inside, what runs at this size is compiled or taken from caches, where that was asked for."""
        if self._regions is None or self._compiling is None or size not in self._compiling.sizes:
            yield Lesson(learned=False)
            return
        with self._regions.learning() as lesson:
            yield lesson

    @contextmanager
    def observing(self) -> Iterator[Rehearsal]:
        """Inside, the calls of a pass that may run compiled are noted, for another thread to have them ready."""
        if self._regions is None:
            yield Rehearsal()
            return
        with self._regions.observing() as rehearsal:
            yield rehearsal

    def _take_up(self, denoiser: Any) -> None:
        # Once, whatever comes of it. Layers that are switched on would hold the old weights, and be held by them.
        self._denoiser = denoiser
        self._drop_layers()
        self._attempt("Channels side by side", partial(lay_channels_side_by_side, denoiser))
        self._attempt("Group norms", partial(spread_group_norms, denoiser))
        self._attempt("Fused projections", partial(fuse_projections, denoiser))
        if self._wants_float8:
            self._add_float8(denoiser)

    def _convolve_before_doubling(self, denoiser: Any, vae: Any) -> None:
        def convolve() -> None:
            for module in (denoiser, vae):
                convolve_before_doubling(module)

        if self._doubles_first or self._attempt("Upsampling", convolve):
            return
        self._doubles_first = True  # for good: other kernels are not tried
        convolve_after_doubling(vae)
        # Some kernels are of the old weights, and there may be graphs that read them.
        if convolve_after_doubling(denoiser):
            self._forget_graphs()

    def _add_float8(self, denoiser: Any) -> None:
        """Round the layers, and switch them on if those of the denoiser before were."""

        def add() -> None:
            self._layers = Float8Layers(denoiser)
            if self._float8_is_on:
                self._switch(self._layers, on=True)

        if not self._attempt("FLOAT8", add):
            self._give_float8_up()

    def _give_float8_up(self) -> None:
        """For good: another denoiser is not tried again."""
        self._wants_float8 = self._float8_is_on = False
        self._drop_layers()

    def _drop_layers(self) -> None:
        if self._layers is not None:
            self._switch(self._layers, on=False)
            self._layers = None

    def _switch(self, layers: Float8Layers, *, on: bool) -> None:
        layers.switch(on)
        self._forget_graphs()

    def _attempt(self, what: str, work: Callable[[], object]) -> bool:
        """Do what makes it faster and can be left out, also halfway; returns whether it went well."""
        reason = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - it is only about speed
            reason = _first_line(error)
        if reason is None:
            return True
        # Only here, with the exception and its frames gone, is what they held free.
        self._empty_cache()
        logger.warning("%s: left out, and images take longer. It failed here (%s).", what, reason)
        return False

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _cover(self, denoiser: Any, vae: Any, compiling: Compiling) -> None:
        try:
            if self._regions is None:
                self._regions = CompiledRegions(only_from_artifacts=compiling.only_from_artifacts)
            self._regions.cover(denoiser, vae)
        except Exception as error:  # noqa: BLE001 - it is only about speed
            self._compiling = self._regions = None
            logger.warning("Serving without compiled code: %s", _first_line(error))

    def try_float8(self, generate: Callable[[], Image.Image]) -> float | None:
        """Switch to 8-bit floats if an image stays near the one without; returns how near, in dB, if it was tried.

        `generate` makes one image, always the same, in as many steps as requests take: errors add up over them. Never
        raises: whatever fails, 8-bit floats are off, for later models too.
        """
        if self._layers is None:
            return None
        decibels, reason = None, ""
        try:
            before = generate()
            self._switch(self._layers, on=True)
            decibels = peak_signal_to_noise(generate(), before)
        except Exception as error:  # noqa: BLE001 - a card's own refusals are of several classes
            reason = _first_line(error)
        if decibels is not None and decibels >= LOWEST_FLOAT8_DECIBELS:
            self._float8_is_on = True
            logger.info("8-bit floats: %.1f dB from the image without.", decibels)
            return decibels
        self._give_float8_up()
        self._empty_cache()
        if decibels is None:
            logger.warning(
                "FLOAT8 is on, but stays off: it failed with this card and dtype (%s).", reason
            )
        else:
            logger.warning(
                "FLOAT8 is on, but with this model its image is %.1f dB from the one without; below %.0f it stays off.",
                decibels,
                LOWEST_FLOAT8_DECIBELS,
            )
        return decibels


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def peak_signal_to_noise(one: Image.Image, other: Image.Image) -> float:
    """In dB, for 8 bits a channel; infinite for equal images."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
