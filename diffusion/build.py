"""A StableDiffusionXLPipeline from config files and a stream of tensors, without a second copy of the weights.

The modules are built empty, on the meta device; each tensor becomes its parameter the moment it lands. Where the
bytes come from, and whether they are the right ones, is the weights room's business.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import nn

from diffusion.components import (
    MODULES,
    TOKENIZERS,
    build_module,
    build_scheduler,
    build_tokenizer,
    check_components,
)
from diffusion.landing import LandedTensor, Landing, Problems
from diffusion.recipe import Recipe, read_config

logger = logging.getLogger(__name__)


def build_pipeline(
    configs: Mapping[str, bytes],
    tensors: Iterable[LandedTensor],
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> StableDiffusionXLPipeline:
    """The pipeline that stock `from_pretrained` would give, on `device` in `dtype`, with the recipe's scheduler.

    Args:
        configs: every file of the model that is not weights, by its path in the diffusers folder.
        tensors: in any order, components interleaved. Each is let go as soon as it is in place, so the peak is the
            model and one tensor.
        dtype: None leaves every tensor as its file holds it.

    Raises `ModelError` when a config asks for what is not supported, or tensors are missing, unexpected or misshapen.
    Whatever `tensors` itself raises passes through.
    """
    check_components(configs)
    scheduler = build_scheduler(recipe.scheduler, configs)
    modules: dict[str, Any] = {name: build_module(name, configs) for name in MODULES}
    tokenizers = {
        tokenizer: build_tokenizer(
            tokenizer, configs, max_tokens=modules[encoder].config.max_position_embeddings
        )
        for tokenizer, encoder in TOKENIZERS.items()
    }
    _land(tensors, modules, device, dtype)

    index = read_config(configs, "model_index.json")
    pipeline = StableDiffusionXLPipeline(
        **modules,
        **tokenizers,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
        add_watermarker=False,  # diffusers marks every image where invisible-watermark happens to be installed
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _land(
    tensors: Iterable[LandedTensor],
    modules: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    landings = {
        name: Landing(name, module, device=device, dtype=module_dtype(module, dtype))
        for name, module in modules.items()
    }
    problems = Problems()
    ignored: set[str] = set()
    for landed in tensors:
        component = landed.path.rpartition("/")[0]
        if component in landings:
            landings[component].take(landed, problems)
        elif landed.path not in ignored:
            ignored.add(landed.path)
            logger.warning("Ignoring %s: it belongs to no part of an SDXL pipeline.", landed.path)
        # Or its memory would outlive it by one turn, while the next tensor takes as much.
        del landed
    for landing in landings.values():
        landing.finish(problems)
    problems.raise_if_any()


def module_dtype(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a module's tensors become in a pipeline of `dtype`."""
    # SDXL's own VAE overflows in float16 and says so. Stock diffusers casts it to float32 and back for every decode;
    # keeping it there costs 170 MB and nothing per image. From a float16 file it decodes to the same pixels; from a
    # float32 one it keeps the bits that stock rounds away while loading.
    if isinstance(module, AutoencoderKL) and dtype == torch.float16 and module.config.force_upcast:
        return torch.float32
    return dtype
