"""A published model out of its bucket, as a deployment has it."""

from __future__ import annotations

import torch

from diffusion.build import build_pipeline
from diffusion.engine import Engine
from diffusion.recipe import Recipe
from weights import Bucket, open_model


def served(bucket: Bucket, model_path: str, dtype: torch.dtype = torch.float32) -> Engine:
    """An engine on the CPU for the version that the bucket serves."""
    with open_model(bucket, model_path) as stream:
        assert stream.recipe is not None
        recipe = Recipe.model_validate(stream.recipe)
        pipeline = build_pipeline(
            stream.configs(), stream.tensors(), recipe, device=torch.device("cpu"), dtype=dtype
        )
    return Engine(pipeline, recipe)
