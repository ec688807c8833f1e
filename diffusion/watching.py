"""Telling whoever asked how far an image is: one `Step` after each denoising step, with a small picture if wanted.

Nothing in here may change or end a generation. What a picture is made of is `previews`' business.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffusion.previews import Previews

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """Denoising step `step` of `steps`, counted from 1, of the image that `seed` gives, is done.

    A scheduler of second order takes nearly two for each that was asked for. `preview` is an RGB picture of at most
    256 pixels, and None where none was asked for or could be made.
    """

    seed: int
    step: int
    steps: int
    preview: "Image.Image | None" = None


Watch = Callable[[Step], None]


class Watching:
    """One image under way, and who watches it. Used on the thread that denoises.

    Args:
        previews: what makes pictures, where they were asked for.
    """

    def __init__(self, watch: Watch, seed: int, previews: "Previews | None") -> None:
        self._watch: Watch | None = watch
        self._seed = seed
        self._previews = previews
        self._clean: torch.Tensor | None = None

    def attach(self, scheduler: Any) -> None:
        """Have a scheduler that is this image's own leave its estimate of the finished latents, if it makes one.

        Between two steps latents are half noise; what they would become is much more to look at.
        """
        if self._previews is None:
            return
        step = type(scheduler).step
        # Or the scheduler, and the tensors it remembers, would keep itself until garbage is collected.
        itself = weakref.ref(scheduler)

        def step_and_keep(*arguments: Any, return_dict: bool = True, **options: Any) -> Any:
            scheduler = itself()
            output = step(scheduler, *arguments, **options, return_dict=True)
            self._clean = _estimate(scheduler, output, *arguments)
            return output if return_dict else output.to_tuple()

        scheduler.step = step_and_keep

    def after_step(self, step: int, steps: int, latents: "torch.Tensor") -> None:
        """Tell of step number `step`, counted from 1. `latents`, of this image alone, are as that step left them."""
        if self._watch is None:
            return
        preview = None
        if self._previews is not None:
            preview = self._previews.picture(latents if self._clean is None else self._clean)
            self._clean = None
        try:
            self._watch(Step(self._seed, step, steps, preview))
        except Exception:
            logger.exception("Nobody is told any more how far seed %d is.", self._seed)
            self._watch = None


def _estimate(scheduler: Any, output: Any, *arguments: Any) -> "torch.Tensor | None":
    """The finished latents as a step saw them coming; `arguments` are what it was given."""
    for name in ("pred_original_sample", "denoised"):  # LCM's is the second
        if (clean := getattr(output, name, None)) is not None:
            return clean  # type: ignore[no-any-return]
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        # It has no name for them, but what it steps along is the straight line to them (arXiv 2210.02747).
        velocity, _timestep, sample = arguments[:3]
        return sample - scheduler.sigmas[scheduler.step_index - 1] * velocity  # type: ignore[no-any-return]
    return None
