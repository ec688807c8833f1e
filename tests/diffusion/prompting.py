"""What the tests of prompts share: one family's small model, and its embeddings by us and by stock."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.small_sdxl import write_small_sdxl
from diffusion.denoising import Embeddings
from diffusion.engine import Engine, GenerationRequest
from diffusion.prompts import Prompts
from diffusion.recipe import Recipe
from diffusion.request import Plan
from tests.diffusion.support import (
    pixels,
)
from tests.support import small_families

PROMPT = "a golden fox over the castle, night"
LONG = "a golden fox over the castle, " * 14 + "a red dragon"
REQUEST = GenerationRequest(prompt=PROMPT, width=64, height=64, steps=2, seed=3)
PLAN = Plan(PROMPT, None, 64, 64, steps=2, guidance_scale=5.0, seeds=(3,))
WRITERS = {"SDXL": write_small_sdxl, "SD 1": small_families.write_small_sd1}


@dataclasses.dataclass(frozen=True)
class Model:
    """One family's small model: its files, and the pipeline built from them."""

    folder: Path
    recipe: Recipe
    pipeline: Any

    def prompts(self, **options: Any) -> Prompts:
        architecture = self.recipe.architecture
        return Prompts(self.pipeline, architecture, torch.device("cpu"), **options)

    def encode(self, prompts: Prompts | None = None, **changes: Any) -> Embeddings:
        with torch.inference_mode():
            return (prompts or self.prompts()).encode(dataclasses.replace(PLAN, **changes))

    def stocks(self, prompt: str, negative: str | None = None, guided: bool = True) -> Embeddings:
        names = self.recipe.architecture.embeddings
        with torch.inference_mode():
            encoded = self.pipeline.encode_prompt(
                prompt=prompt,
                negative_prompt=negative,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
        return dict(zip(names, encoded, strict=True))

    @contextmanager
    def runs(self) -> Iterator[list[str]]:
        """The text encoders that ran, one name a run."""
        seen: list[str] = []
        encoders = [found.encoder for found in self.recipe.architecture.tokenizers.values()]
        hooks = [
            getattr(self.pipeline, name).register_forward_hook(
                lambda *_, name=name: seen.append(name)
            )
            for name in encoders
        ]
        yield seen
        for hook in hooks:
            hook.remove()


def assert_equal(mine: Embeddings, theirs: Embeddings) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        other = theirs[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or torch.equal(tensor, other), name


def assert_close(mine: Embeddings, theirs: Embeddings) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def distance(one: Embeddings, other: Embeddings, name: str = "prompt_embeds") -> float:
    return float((one[name] - other[name]).norm())


def images(engine: Engine, **changes: Any) -> list[np.ndarray]:
    request = dataclasses.replace(REQUEST, **changes)
    return [pixels(made.image) for made in engine.generate(request)]
