"""One version of a model, whole: its parts, its recipe, and what they make of a request."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusion.denoising import Embeddings, is_guided
from diffusion.fitting import visiting
from diffusion.previews import Previews
from diffusion.recipe import Recipe
from diffusion.request import GenerationRequest, Plan, plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Who holds this has parts that belong together."""

    pipeline: DiffusionPipeline
    recipe: Recipe
    version: str | None
    name: str = ""

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.recipe.architecture.denoiser)

    @cached_property
    def previews(self) -> Previews:
        return Previews(self.pipeline)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    def plan(self, request: GenerationRequest) -> Plan:
        """Raises `RequestError` for what this checkpoint cannot do."""
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

    def encode(self, wanted: Plan) -> Embeddings:
        """What the text encoders make of a plan's prompts, of batch 1."""
        architecture = self.recipe.architecture
        guided = is_guided(self.denoiser, wanted)
        self._log_dropped_tokens("prompt", wanted.prompt)
        if guided and wanted.negative_prompt is not None:
            self._log_dropped_tokens("negative_prompt", wanted.negative_prompt)
        encoders = [
            getattr(self.pipeline, part.encoder) for part in architecture.tokenizers.values()
        ]
        with visiting([encoder for encoder in encoders if encoder is not None], self.device):
            encoded = self.pipeline.encode_prompt(
                prompt=wanted.prompt,
                negative_prompt=wanted.negative_prompt,
                **dict.fromkeys(architecture.further_prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
        return dict(zip(architecture.embeddings, encoded, strict=True))

    def _log_dropped_tokens(self, name: str, text: str) -> None:
        """Warn of what no encoder reads; what only the shorter of them drop, the longest still sees."""
        pipeline = self.pipeline
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
