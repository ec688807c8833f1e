"""What the tests of a refresh share: engines, other versions for them, and what tells two engines apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.engine import Engine, GenerationRequest
from diffusion.recipe import SDXL, Recipe
from diffusion.refresh import Staged, stage
from tests.diffusion.support import (
    LIGHTNING,
    build,
    pixels,
    read_configs,
    read_tensors,
)

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=2, seed=3)


def serve(
    folder: Path, recipe: Recipe = LIGHTNING, version: str = "old", **build_as: Any
) -> Engine:
    return Engine(build(folder, recipe, **build_as), recipe, version)


def staged(folder: Path, recipe: Recipe = LIGHTNING, **changes: Any) -> Staged:
    given = {"configs": read_configs(folder), "tensors": read_tensors(folder)} | changes
    return stage(given["configs"], given["tensors"], recipe, "new")


def images(engine: Engine, **changes: Any) -> list[np.ndarray]:
    return [pixels(made.image) for made in engine.generate(replace(REQUEST, **changes))]


def assert_same_images(engine: Engine, other: Engine, **changes: Any) -> None:
    for request in (changes, {"prompt": "猫", "seed": 9, "width": 96, **changes}):
        for mine, theirs in zip(images(engine, **request), images(other, **request), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def tensors_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        f"{part}: {name}": tensor
        for part in SDXL.modules
        for name, tensor in (
            *getattr(engine._pipeline, part).named_parameters(),
            *getattr(engine._pipeline, part).named_buffers(),
        )
    }


def assert_same_tensors(engine: Engine, other: Engine) -> None:
    mine, theirs = tensors_of(engine), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
        assert not tensor.requires_grad


def places(engine: Engine, part: str = "") -> dict[str, int]:
    return {
        name: tensor.data_ptr()
        for name, tensor in tensors_of(engine).items()
        if name.startswith(part and f"{part}: ")
    }
