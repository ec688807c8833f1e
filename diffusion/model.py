"""One version of a model, whole: its parts, its recipe, and what they make of a request."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusion.previews import Previews
from diffusion.prompts import Prompts
from diffusion.recipe import Recipe
from diffusion.request import GenerationRequest, Plan, plan


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

    @property
    def text_encoders(self) -> list[Any]:
        """Those it has, in the order of its tokenizers."""
        named = [tokenizer.encoder for tokenizer in self.recipe.architecture.tokenizers.values()]
        found = [getattr(self.pipeline, name) for name in named]
        return [encoder for encoder in found if encoder is not None]

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

    @cached_property
    def prompts(self) -> Prompts:
        """What has been read for this version, and for no other. The device's thread alone uses it."""
        return Prompts(self.pipeline, self.recipe.architecture, self.device)
