"""A request on its way through the engine: what was asked for, one image on the device, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from diffusion.clock import Spent
from diffusion.decoding import Decoded
from diffusion.denoising import Denoising, Embeddings
from diffusion.line import Job
from diffusion.model import Model
from diffusion.recipe import SDXL
from diffusion.request import GenerationRequest, Plan
from diffusion.watching import Watch, Watching


@dataclass(frozen=True)
class GeneratedImage:
    """One image, what made it, and the seconds each stage took.

    Stages: "wait" for the device, "prompt" (0 but for a request's first image, whose embeddings the others share),
    "denoise", "decode"; of what it shared with others, its share; "switch", where models take turns. `version` is the
    model's that made it: another may serve by the time somebody asks.
    """

    image: Image.Image
    seed: int
    steps: int
    guidance_scale: float
    timings: dict[str, float]
    version: str | None = None


@dataclass
class Wish:
    """What a job in the line is about: a request, what the model it is for made of it, and who watches it.

    `embeddings` are kept from its first image for the others.
    """

    request: GenerationRequest
    plan: Plan
    model: Model
    watch: Watch | None = None
    previews: bool = False
    embeddings: Embeddings | None = None


@dataclass(eq=False)
class UnderWay:
    """One image on the device."""

    job: Job[Wish]
    index: int
    denoising: Denoising
    waited: float
    spent: Spent
    watching: Watching | None

    @property
    def seed(self) -> int:
        return self.job.detail.plan.seeds[self.index]

    def tell(self) -> None:
        """Say that a step is done, unless nobody asked, nobody waits any more, or it failed."""
        if self.watching is not None and self.job.open and not self.job.left:
            denoising = self.denoising
            self.watching.after_step(denoising.step, len(denoising.timesteps), denoising.latents)

    def picture(self, decoded: Decoded) -> GeneratedImage:
        """Once the device has made it. Raises `NonFiniteError` for what would be black."""
        wish = self.job.detail
        picture = decoded.picture(
            self.seed,
            wish.model.pipeline.vae.dtype,
            is_sdxl=wish.model.recipe.pipeline == SDXL.pipeline,
        )
        spent = {stage: self.spent.seconds(stage) for stage in ("prompt", "denoise", "decode")}
        if (switch := self.spent.seconds("switch")) > 0:
            spent["switch"] = switch
        return GeneratedImage(
            picture,
            self.seed,
            wish.plan.steps,
            wish.plan.guidance_scale,
            {"wait": self.waited, **spent},
            wish.model.version,
        )
