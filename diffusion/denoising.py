"""One image on its way from noise to latents, and one pass of the denoiser for any number of them.

The arithmetic is that of stock pipelines' `__call__`, step by step, with their own methods where they have them. Only
the denoiser's pass is shared: noise, scheduler and place in the steps are each image's own, so that images join and
leave between any two steps and need not agree on how many they take.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor

from diffusion.company import Company
from diffusion.families import Architecture
from diffusion.graphs import Graphs
from diffusion.prompt_keys import prepared
from diffusion.recipe import SDXL
from diffusion.request import Plan

# What the text encoders made of a request, by the names that the pipeline's `__call__` takes; what guidance needs is
# None without it.
Embeddings = Mapping[str, torch.Tensor | None]


class Denoising:
    """One image between two steps. `latents` are its own, of batch 1; `step` counts the passes it has had.

    Args:
        embeddings: of batch 1, from `encode_prompt`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        architecture: Architecture,
        plan: Plan,
        seed: int,
        embeddings: Embeddings,
        device: torch.device,
    ) -> None:
        self._denoiser: Any = getattr(pipeline, architecture.denoiser)
        self._is_unet = architecture.denoiser == "unet"
        self._guidance_scale = plan.guidance_scale
        self._guided = is_guided(self._denoiser, plan)
        # Noise from the CPU is the same on every card.
        generator = torch.Generator("cpu").manual_seed(seed)
        # A scheduler counts its steps and remembers past ones: none of it is another image's business.
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        scale = pipeline.vae_scale_factor
        shape = (
            1,
            self._denoiser.config.in_channels,
            plan.height // scale,
            plan.width // scale,
        )
        self.timesteps = self._begin_steps(plan.steps, shape, device)
        noise = randn_tensor(
            shape, generator, device=device, dtype=_tensor(embeddings, "prompt_embeds").dtype
        )
        # Rectified flow, which transformers are trained with, begins at noise of unit variance.
        self.latents = noise * self._scheduler.init_noise_sigma if self._is_unet else noise
        self.step = 0
        self._step_arguments: dict[str, Any] = (
            pipeline.prepare_extra_step_kwargs(generator, 0.0) if self._is_unet else {}
        )
        self._conditions = {
            name: condition.to(device)
            for name, condition in self._conditions_of(
                pipeline, architecture, plan, embeddings
            ).items()
        }
        self._prepared: torch.Tensor | None = None
        # Images whose shapes are equal can share a pass.
        self.shape = (
            self.rows,
            self.latents.shape,
            *(condition.shape for condition in self._conditions.values()),
        )

    @property
    def scheduler(self) -> Any:
        """This image's own."""
        return self._scheduler

    @property
    def done(self) -> bool:
        return self.step == len(self.timesteps)

    @property
    def rows(self) -> int:
        """How many rows it takes in the denoiser's batch: guidance wants a second, without the prompt."""
        return 2 if self._guided else 1

    @property
    def state(self) -> str:
        """How far it has come, for people. Schedulers of second order take nearly two steps for each asked for."""
        return f"step {self.step} of {len(self.timesteps)}"

    def inputs(self, *, in_company: bool = False) -> dict[str, torch.Tensor]:
        """What the denoiser takes for the step that is next, by names of ours; `rows` in every batch.

        Alone, its prompt is prepared once. In company that would be held for each image, and all of them joined in
        every step, which is much memory: there the denoiser prepares it, as stock does.
        """
        timestep = self.timesteps[self.step]
        sample = torch.cat([self.latents] * 2) if self._guided else self.latents
        if hasattr(self._scheduler, "scale_model_input"):
            sample = self._scheduler.scale_model_input(sample, timestep)
        prompt = self._conditions["prompt"]
        if in_company:
            self._prepared = None
        else:
            if self._prepared is None:
                self._prepared = prepared(self._denoiser, prompt)
            prompt = self._prepared
        return {"sample": sample, "timestep": timestep, **self._conditions, "prompt": prompt}

    def advance(self, prediction: torch.Tensor) -> None:
        """Take the step that the denoiser's prediction for `inputs()` leads to."""
        if self._guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + self._guidance_scale * (with_prompt - without)
        self.latents = self._scheduler.step(
            prediction,
            self.timesteps[self.step],
            self.latents,
            **self._step_arguments,
            return_dict=False,
        )[0]
        self.step += 1

    def _begin_steps(
        self, steps: int, shape: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        arguments: dict[str, float] = {}
        config = self._scheduler.config
        if not self._is_unet and config.get("use_dynamic_shifting"):
            patch = self._denoiser.config.patch_size
            arguments["mu"] = calculate_shift(
                (shape[2] // patch) * (shape[3] // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        timesteps: torch.Tensor
        timesteps, _ = retrieve_timesteps(self._scheduler, steps, device, **arguments)
        return timesteps

    def _conditions_of(
        self,
        pipeline: DiffusionPipeline,
        architecture: Architecture,
        plan: Plan,
        embeddings: Embeddings,
    ) -> dict[str, torch.Tensor]:
        """What stays the same through all steps."""

        def with_negative(name: str) -> torch.Tensor:
            positive = _tensor(embeddings, name)
            return (
                torch.cat([_tensor(embeddings, f"negative_{name}"), positive])
                if self._guided
                else positive
            )

        conditions = {"prompt": with_negative("prompt_embeds")}
        if "pooled_prompt_embeds" in embeddings:
            conditions["pooled"] = with_negative("pooled_prompt_embeds")
        if architecture.pipeline == SDXL.pipeline:
            size = (plan.height, plan.width)
            time_ids = pipeline._get_add_time_ids(  # noqa: SLF001 - stock's own, and it has no other name
                size,
                (0, 0),
                size,
                dtype=conditions["prompt"].dtype,
                text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
            )
            conditions["time_ids"] = torch.cat([time_ids] * self.rows)
            if hasattr(self._scheduler, "set_begin_index"):
                self._scheduler.set_begin_index(0)
        told = self._denoiser.config.get("time_cond_proj_dim")
        if told is not None:
            conditions["guidance"] = pipeline.get_guidance_scale_embedding(
                torch.tensor(plan.guidance_scale - 1).repeat(1), embedding_dim=told
            ).to(self.latents.dtype)
        return conditions


def is_guided(denoiser: Any, plan: Plan) -> bool:
    """Whether the plan wants a second pass without the prompt. A denoiser that is told the scale needs none."""
    return plan.guidance_scale > 1 and denoiser.config.get("time_cond_proj_dim") is None


def predictions(
    denoiser: Any, images: Sequence[Denoising], company: Company, graphs: Graphs
) -> list[torch.Tensor]:
    """What the denoiser predicts for images of equal `shape`. Changes none of them: failing, it can be asked again."""
    rows = images[0].rows

    def predict(batch: Mapping[str, torch.Tensor], *, alone: bool) -> torch.Tensor:
        call = partial(_predict, denoiser, rows=rows, alone=alone)
        prediction: torch.Tensor = graphs.run(denoiser, call, batch, kind=(rows, alone))
        return prediction

    inputs = [image.inputs(in_company=len(images) > 1) for image in images]
    return company.predict(predict, inputs, images[0].shape, rows)


def _predict(
    denoiser: Any, batch: Mapping[str, torch.Tensor], *, rows: int, alone: bool
) -> torch.Tensor:
    sample, timestep = batch["sample"], batch["timestep"]
    arguments: dict[str, Any]
    if denoiser.config.get("patch_size") is None:
        arguments = {"timestep_cond": batch.get("guidance")}
        if "time_ids" in batch:
            arguments["added_cond_kwargs"] = {
                "text_embeds": batch["pooled"],
                "time_ids": batch["time_ids"],
            }
    else:
        timestep = timestep.expand(rows) if alone else timestep
        arguments = {"pooled_projections": batch["pooled"]}
    prediction: torch.Tensor = denoiser(
        sample,
        timestep=timestep,
        encoder_hidden_states=batch["prompt"],
        return_dict=False,
        **arguments,
    )[0]
    return prediction


def _tensor(embeddings: Embeddings, name: str) -> torch.Tensor:
    tensor = embeddings[name]
    assert tensor is not None, name  # noqa: S101 - encode_prompt gives what guidance asks for
    return tensor
