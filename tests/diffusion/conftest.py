"""One small model, and the engines and stock pipelines made from it, for the whole run."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import Engine
from tests.diffusion.support import GUIDED, LIGHTNING, build_engine, stock_pipeline


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
