"""Runs the pipeline: prompt to embeddings, embeddings to latents, latents to an image, one image at a time.

The parts and their arithmetic are stock diffusers', so the pixels are too. Encoding images into files is not done here.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusion.device import ran_out_of_memory
from diffusion.errors import NonFiniteError, OutOfMemoryError
from diffusion.gate import Gate
from diffusion.latents import unscaled
from diffusion.recipe import SDXL, Recipe
from diffusion.refresh import Staged, one_refresh_at_a_time, take_over
from diffusion.request import GenerationRequest, Plan, plan
from diffusion.turns import Turns

logger = logging.getLogger(__name__)

__all__ = ["Engine", "GeneratedImage", "GenerationRequest"]


@dataclass(frozen=True)
class GeneratedImage:
    """One image, what made it, and the seconds each stage took.

    Stages: "wait" for the device, "prompt" (0 but for a request's first image, whose embeddings the others share),
    "denoise", "decode". `version` is the model's that made it: another may serve by the time somebody asks.
    """

    image: Image.Image
    seed: int
    steps: int
    guidance_scale: float
    timings: dict[str, float]
    version: str | None = None


# What the text encoders made of a request, by the names that the pipeline's `__call__` takes; what guidance needs is
# None without it.
_Embeddings = dict[str, torch.Tensor | None]


class _CancelledError(Exception):
    """Nobody waits for the image any more. Never leaves the engine: the iterator ends."""


@dataclass(frozen=True)
class _Model:
    """One version, whole: who holds this has parts that belong together."""

    pipeline: DiffusionPipeline
    recipe: Recipe
    version: str | None

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.recipe.architecture.denoiser)

    def plan(self, request: GenerationRequest) -> Plan:
        config, scale = self.denoiser.config, self.pipeline.vae_scale_factor
        # A transformer cuts latents into patches; a UNet halves them once per block after the first.
        patch = config.get("patch_size")
        multiple = scale * (patch or 2 ** (len(config["block_out_channels"]) - 1))
        # Patches beyond the table of their positions have no place.
        largest = config.get("pos_embed_max_size") if patch else None
        return plan(
            request,
            self.recipe,
            size_multiple=multiple,
            largest_size=largest * multiple if largest else None,
        )


class Engine:
    """Generates images on one device, for any number of threads, one image at a time and first come, first served.

    `version` names the model that the pipeline was built from; whatever name is given, every image carries it.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, recipe: Recipe, version: str | None = None
    ) -> None:
        self._model = _Model(pipeline, recipe, version)
        self._device: torch.device = self._model.denoiser.device
        self._dtype: torch.dtype = self._model.denoiser.dtype
        self._gate = Gate()
        self._turns = Turns()

    @property
    def recipe(self) -> Recipe:
        return self._model.recipe

    @property
    def version(self) -> str | None:
        """The version that serves now. A `GeneratedImage` says which one made it."""
        return self._model.version

    @property
    def _pipeline(self) -> DiffusionPipeline:
        return self._model.pipeline

    def generate(
        self, request: GenerationRequest, cancelled: Event | None = None
    ) -> Iterator[GeneratedImage]:
        """The request's images, each made when it is asked for, and all by one version of the model.

        Args:
            cancelled: set it, from any thread, when nobody waits for the images any more. The iterator then ends
                without a further image: at once when its turn comes, or after the denoising step it is in.

        The request is checked at once, before the first image: `RequestError` says what this checkpoint cannot do.
        While iterating, `OutOfMemoryError` and `NonFiniteError` end the request and leave the engine able; and where
        another version took over before the first image, `RequestError` says what that one cannot do.

        From its first image until before its last the iterator keeps the model from being replaced. Ask it for all of
        them, or drop or `close()` it; and begin no other iterator on the same thread while it is halfway.
        """
        model = self._model
        return self._images(request, model, model.plan(request), cancelled or Event())

    def replace(self, staged: Staged, *, patience: float = 600.0) -> float:
        """Serve another version from now on; returns the seconds for which new requests had to wait.

        Requests under way end with the version they began with, and those that come meanwhile wait for the new one.
        Where shapes stay the same its tensors lie where the old ones lay (see `take_over`).

        Raises `BusyError` when requests under way are not done after `patience` seconds, and `ModelError` when the
        device has no room for a part that changed. The old version then goes on serving.
        """
        with one_refresh_at_a_time:
            closed = time.perf_counter()
            with self._gate.exclusive(patience):
                begun = time.perf_counter()
                old = self._model
                take_over(staged, old.pipeline, device=self._device, dtype=self._dtype)
                self._model = _Model(staged.pipeline, staged.recipe, staged.version)
                done = time.perf_counter()
        logger.info(
            "Version %s took over from %s in %.2f s, after %.2f s for the requests under way.",
            staged.version,
            old.version,
            done - begun,
            begun - closed,
        )
        return done - closed

    def warm_up(self) -> float:
        """Generate one image at the native size, so that no caller pays for the first use; returns the seconds."""
        started = time.perf_counter()
        recipe = self.recipe
        request = GenerationRequest(
            prompt="warm-up",
            width=recipe.native_size,
            height=recipe.native_size,
            # One step runs every kernel there is, where the checkpoint can do one.
            steps=1 if recipe.steps is None else min(recipe.steps),
            seed=0,
        )
        for _ in self.generate(request):
            pass
        return time.perf_counter() - started

    def _images(
        self, request: GenerationRequest, model: _Model, plan: Plan, cancelled: Event
    ) -> Iterator[GeneratedImage]:
        embeddings: _Embeddings | None = None
        asked = time.perf_counter()
        try:
            with self._gate.shared():
                if model is not self._model:
                    model = self._model
                    plan = model.plan(request)
                for seed in plan.seeds:
                    # A turn is one image, not one request: between two of ours, others get theirs.
                    with self._turns:
                        timings = {"wait": time.perf_counter() - asked, "prompt": 0.0}
                        _stop_if(cancelled, f"seed {seed} was not begun")
                        image, embeddings = self._image(plan, seed, embeddings, timings, cancelled)
                    made = GeneratedImage(
                        image, seed, plan.steps, plan.guidance_scale, timings, model.version
                    )
                    if seed != plan.seeds[-1]:
                        yield made
                        asked = time.perf_counter()
        except _CancelledError as reason:
            logger.info("Cancelled: %s.", reason)
            return
        # The last one goes out with the gate given back, since many a caller never asks whether there are more.
        yield made

    def _image(
        self,
        plan: Plan,
        seed: int,
        embeddings: _Embeddings | None,
        timings: dict[str, float],
        cancelled: Event,
    ) -> tuple[Image.Image, _Embeddings]:
        try:
            with torch.inference_mode():
                if embeddings is None:
                    with self._timed(timings, "prompt"):
                        embeddings = self._encode(plan)
                with self._timed(timings, "denoise"):
                    latents = self._denoise(plan, embeddings, seed, cancelled)
                with self._timed(timings, "decode"):
                    return self._decode(latents, seed), embeddings
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Only here, with the exception gone, are its frames and their tensors gone too, and their memory to be had.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"The device {self._device} ran out of memory on one image of {plan.width}x{plan.height} ({reason}). "
            "Ask for a smaller size, or give the model a card with more memory."
        )

    def _encode(self, plan: Plan) -> _Embeddings:
        architecture = self.recipe.architecture
        # A denoiser that is told the guidance scale needs no second pass without the prompt.
        told = self._model.denoiser.config.get("time_cond_proj_dim") is not None
        guided = plan.guidance_scale > 1 and not told
        self._log_dropped_tokens("prompt", plan.prompt)
        if guided and plan.negative_prompt is not None:
            self._log_dropped_tokens("negative_prompt", plan.negative_prompt)
        encoded = self._pipeline.encode_prompt(
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            **dict.fromkeys(architecture.further_prompts),
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        return dict(zip(architecture.embeddings, encoded, strict=True))

    def _denoise(
        self, plan: Plan, embeddings: _Embeddings, seed: int, cancelled: Event
    ) -> torch.Tensor:
        # Alone in its batch: kernels choose their order of summation by shape, so in company an image would differ in
        # its last bits from the one its seed gives alone.
        pipeline = self._pipeline

        def between_steps(
            _pipeline: object, step: int, _timestep: object, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            # Schedulers of second order take nearly two of these for each step asked for.
            steps = len(pipeline.scheduler.timesteps)
            _stop_if(cancelled, f"seed {seed} ended after step {step + 1} of {steps}")
            return tensors  # as they came: stock goes on with them

        # A scheduler counts its steps and remembers past ones; an image that failed must not hand those on.
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        latents: torch.Tensor = pipeline(
            **embeddings,
            width=plan.width,
            height=plan.height,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            # Noise from the CPU is the same on every card.
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            callback_on_step_end=between_steps,
        ).images
        return latents

    def _decode(self, latents: torch.Tensor, seed: int) -> Image.Image:
        """The last part of the stock pipeline's call, with a look at the result before it becomes bytes."""
        vae = self._pipeline.vae
        scaled = unscaled(latents.to(vae.dtype), vae.config)
        pixels = vae.decode(scaled, return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            is_sdxl = self.recipe.pipeline == SDXL.pipeline
            raise NonFiniteError(_explain_non_finite(latents, vae.dtype, seed, is_sdxl))
        image: Image.Image = self._pipeline.image_processor.postprocess(pixels, output_type="pil")[
            0
        ]
        return image

    def _log_dropped_tokens(self, name: str, text: str) -> None:
        """Warn of what no encoder reads; what only the shorter of them drop, the longest still sees."""
        pipeline = self._pipeline
        tokenizers = [getattr(pipeline, part) for part in self.recipe.architecture.tokenizers]
        longest = max(filter(None, tokenizers), key=lambda found: int(found.model_max_length))
        tokens = len(longest(text).input_ids)
        if tokens > longest.model_max_length:
            logger.warning(
                "The %s is %d tokens long: the last %d were dropped, since the text encoder reads only %d.",
                name,
                tokens,
                tokens - longest.model_max_length,
                longest.model_max_length,
            )

    @contextmanager
    def _timed(self, timings: dict[str, float], stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels run on after their launch returns
        timings[stage] = time.perf_counter() - started


def _stop_if(cancelled: Event, state: str) -> None:
    if cancelled.is_set():
        raise _CancelledError(state)


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
