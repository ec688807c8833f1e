"""One small model, and the engines and stock pipelines made from it, for the whole run."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import Engine
from diffusion.recipe import Recipe
from tests.diffusion.prompting import WRITERS, Model
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    build,
    build_engine,
    read_configs,
    stock_pipeline,
)


@pytest.fixture(scope="session")
def model(small_sdxl: Path) -> Path:
    return small_sdxl


@pytest.fixture(scope="session")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sdxl(tmp_path_factory.mktemp("small-sdxl-fp16"), dtype="float16")


@pytest.fixture(scope="session")
def lightning(model: Path) -> Engine:
    return build_engine(model, LIGHTNING)


@pytest.fixture(scope="session")
def guided(model: Path) -> Engine:
    return build_engine(model, GUIDED)


@pytest.fixture(scope="session")
def stock(model: Path) -> StableDiffusionXLPipeline:
    return stock_pipeline(model, torch.float32)


@pytest.fixture(scope="session")
def update(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of `model`: the same configs, other weights."""
    return write_small_sdxl(tmp_path_factory.mktemp("small-sdxl-update"), seed=1)


@pytest.fixture(scope="module", params=WRITERS, ids=WRITERS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = WRITERS[request.param](tmp_path_factory.mktemp("model"))
    recipe = Recipe.from_configs(read_configs(folder))
    return Model(folder, recipe, build(folder, recipe))


@pytest.fixture(scope="module")
def sdxl(model: Path) -> Model:
    return Model(model, GUIDED, build(model, GUIDED))
