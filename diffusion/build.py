"""A diffusers pipeline from config files and a stream of tensors, without a second copy of the weights.

The modules are built empty, on the meta device; each tensor becomes its parameter the moment it lands. Where the
bytes come from, and whether they are the right ones, is the weights room's business.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from diffusion.components import build_module, build_scheduler, build_tokenizer, parts_of
from diffusion.device import free_bytes
from diffusion.errors import ModelError
from diffusion.families import PREVIEW_VAE, PREVIEW_VAE_CLASS
from diffusion.fitting import Fit, choose_fit, decode_in_tiles, needs_of
from diffusion.float8 import computes_float8
from diffusion.host_memory import pin
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
    fit: Fit | None = None,
    float8: bool = False,
) -> DiffusionPipeline:
    """The pipeline that stock `from_pretrained` would give, on `device` in `dtype`, with the recipe's scheduler.

    Beside its components it carries, as `preview_vae`, the tiny VAE that the model was published with, or None.

    Args:
        configs: every file of the model that is not weights, by its path in the diffusers folder.
        tensors: in any order, components interleaved. Each is let go as soon as it is in place, so the peak is the
            model and one tensor.
        dtype: None leaves every tensor as its file holds it.
        fit: how the model is laid out on a card; by default, as fast as the card's free memory allows.
        float8: whether that memory is to hold 8-bit copies of the large layers too, on a card that computes them.

    Raises `ModelError` when a config asks for what is not supported, or tensors are missing, unexpected or misshapen.
    Whatever `tensors` itself raises passes through.
    """
    architecture = recipe.architecture
    index = read_config(configs, "model_index.json")
    if index.get("_class_name") != architecture.pipeline:
        raise ModelError(
            f"The model's recipe is for a {architecture.pipeline}, but its model_index.json says "
            f"{index.get('_class_name')!r}. Publish the model again."
        )
    present = parts_of(configs, architecture)
    scheduler = build_scheduler(recipe.scheduler, configs)
    modules: dict[str, Any] = {
        name: build_module(name, kind, configs)
        for name, kind in architecture.modules.items()
        if name in present
    }
    tokenizers = {
        name: build_tokenizer(
            name,
            tokenizer.kind,
            configs,
            max_tokens=tokenizer.max_tokens
            or modules[tokenizer.encoder].config.max_position_embeddings,
        )
        for name, tokenizer in architecture.tokenizers.items()
        if name in present
    }
    beside: dict[str, Any] = {}
    if f"{PREVIEW_VAE}/config.json" in configs:
        beside[PREVIEW_VAE] = build_module(PREVIEW_VAE, PREVIEW_VAE_CLASS, configs)
    if fit is None:
        fit = _choose_fit(modules, recipe, device, dtype, float8=float8)
    places = {
        name: torch.device("cpu") if fit.text_on_host and _reads_text(name, recipe) else device
        for name in modules | beside
    }
    _land(tensors, modules | beside, recipe, places, dtype)
    if fit.text_on_host:
        for name, module in modules.items():
            if _reads_text(name, recipe):
                pin(module)
    if fit.tiles:
        decode_in_tiles(modules["vae"])

    pipeline: DiffusionPipeline = getattr(diffusers, architecture.pipeline)(
        **dict.fromkeys(architecture.optional) | modules | tokenizers,
        scheduler=scheduler,
        **{name: index.get(name, default) for name, default in architecture.settings.items()},
        **architecture.arguments,
    )
    pipeline.preview_vae = beside.get(PREVIEW_VAE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _land(
    tensors: Iterable[LandedTensor],
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    places: Mapping[str, torch.device],
    dtype: torch.dtype | None,
) -> None:
    landings = {
        name: Landing(name, module, device=places[name], dtype=module_dtype(module, recipe, dtype))
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
            logger.warning(
                "Ignoring %s: it belongs to no part of a %s.", landed.path, recipe.pipeline
            )
        # Or its memory would outlive it by one turn, while the next tensor takes as much.
        del landed
    for landing in landings.values():
        landing.finish(problems)
    problems.raise_if_any()


def _reads_text(name: str, recipe: Recipe) -> bool:
    return any(tokenizer.encoder == name for tokenizer in recipe.architecture.tokenizers.values())


def _choose_fit(
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    float8: bool,
) -> Fit:
    if device.type != "cuda":
        return Fit()
    dtypes = {name: module_dtype(module, recipe, dtype) for name, module in modules.items()}
    needs = needs_of(
        modules,
        # What is left as it comes is half precision in any model that is worth its disk.
        {name: (found or torch.float16).itemsize for name, found in dtypes.items()},
        recipe.architecture.denoiser,
        recipe.native_size,
        guided=recipe.guidance_scale > 1,
        float8=float8 and computes_float8(device),
    )
    return choose_fit(free_bytes(device), needs)


def module_dtype(
    module: nn.Module, recipe: Recipe, dtype: torch.dtype | None
) -> torch.dtype | None:
    """What a module's tensors become in a pipeline of `dtype`."""
    if dtype != torch.float16 or not isinstance(module, AutoencoderKL):
        return dtype
    # SDXL's own VAE overflows in float16 and says so. Stock diffusers casts it to float32 and back for every decode;
    # keeping it there costs 170 MB and nothing per image. From a float16 file it decodes to the same pixels; from a
    # float32 one it keeps the bits that stock rounds away while loading. Other classes of pipeline do not heed the
    # mark, which their VAEs all carry, being the default: for them it is the recipe that says so.
    marked = recipe.architecture.upcasts_vae and module.config.force_upcast
    return torch.float32 if marked or recipe.vae_overflows else dtype
