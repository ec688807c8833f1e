"""Whether a model's VAE overflows float16, found by running its decoder, and the mark that keeps such a one in float32.

SDXL's own does: inside its decoder numbers pass 65504, the largest in float16, become infinite, and the image is black
(https://huggingface.co/madebyollin/sdxl-vae-fp16-fix). Finetunes carry that one or another, with whichever config.

A VAE that overflows is marked and not replaced: with the mark its pixels are those its authors saw, another VAE's are
not, and would have to come from the Hub, which a folder's or a bucket's owner may not reach. `--vae` replaces it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from diffusion.errors import ModelError
from diffusion.recipe import Recipe, read_config
from preparation.convert import read_headers
from preparation.errors import UsageError
from preparation.filled import fill
from preparation.lightning import VAE_REPO

if TYPE_CHECKING:
    from preparation.progress import Progress

VAE: Final = "vae"
CLASS_NAME: Final = "AutoencoderKL"
FLOAT16_MAX: Final = 65504.0
# How far an image may go beyond the samples. SDXL's own VAE is reported to reach several times the limit, the one that
# was finetuned against it a tenth: that leaves room on both sides.
MARGIN: Final = 2.0
_CONFIG = "vae/config.json"


def check_class(config: Mapping[str, Any], label: str) -> None:
    """Raises UsageError unless the config is of the one class of VAE that is served."""
    found = config.get("_class_name", CLASS_NAME)
    if found != CLASS_NAME:
        raise UsageError(
            f"{label} is an {found}, as its config.json says; models are served with {CLASS_NAME} alone. Give the full "
            f"VAE of the model's family, for SDXL {VAE_REPO}."
        )


def mark_overflow(folder: Path, recipe: Recipe, label: str, progress: Progress) -> Recipe:
    """Run the decoder that is to be published from `folder`; where it would overflow float16, see that it is marked.

    The mark is `force_upcast` in its config, which stock diffusers heeds too, where the pipeline's class heeds it;
    for the others it is the recipe's `vae_overflows`. Returns the recipe, changed or not.

    Raises:
        UsageError: its files do not fit its config, or it decodes to NaN even in float32.
        PreparationError: a file is damaged.
    """
    from preparation.largest import largest_number

    place = folder / VAE / "config.json"
    config = _read(place, label)
    check_class(config, label)
    size = sum(file.stat().st_size for file in (folder / VAE).glob("*.safetensors"))
    with progress.stage("Try VAE", size) as stage:
        vae = _load(folder / VAE, config, label)
        largest = largest_number(vae, lambda share: stage.advance(round(size * share)))
    if not math.isfinite(largest):
        raise UsageError(
            f"{label} decodes to NaN or infinity even in float32, so every image would be black. Its weights are "
            "damaged: get them again, or take another with --vae."
        )
    overflows = largest * MARGIN > FLOAT16_MAX
    heeded, marked = recipe.architecture.upcasts_vae, bool(vae.config.force_upcast)
    if overflows and heeded and not marked:
        text = json.dumps({**config, "force_upcast": True}, indent=2)
        place.write_text(f"{text}\n", encoding="utf-8")
    if overflows and not heeded:
        recipe = recipe.model_copy(update={"vae_overflows": True})
    if line := _finding(largest, overflows, marked, recipe, label):
        progress.say(line)
    return recipe


def _finding(
    largest: float, overflows: bool, marked: bool, recipe: Recipe, label: str
) -> str | None:
    """What a person should know of it; None where there is nothing to be done and nothing that costs."""
    near = "" if largest > FLOAT16_MAX else ", too near"
    found = f"{label} reaches {largest:,.0f} inside its decoder, and float16 ends at 65,504"
    cost = "Served in float16 it decodes in float32, which takes longer and more memory."
    if not recipe.architecture.upcasts_vae:
        if not overflows:
            return None
        return (
            f"{found}{near}: the recipe now says so (vae_overflows). {cost} Elsewhere a {recipe.pipeline} does not do "
            "that by itself: its images would be black."
        )
    if overflows:
        says = "says" if marked else "now says"
        return (
            f"{found}{near}: its config.json {says} so (force_upcast). {cost} --vae {VAE_REPO} takes one for "
            "SDXL that need not."
        )
    if marked:
        return (
            f"{found}, but its config.json asks for float32 (force_upcast), which is left as its authors have it. "
            f'{cost} To decode in float16, publish from a folder whose vae/config.json says "force_upcast": false.'
        )
    return None


def _read(place: Path, label: str) -> dict[str, Any]:
    try:
        return read_config({_CONFIG: place.read_bytes()}, _CONFIG)
    except ModelError as error:
        raise UsageError(f"{label}: {error}") from error


def _load(folder: Path, config: Mapping[str, Any], label: str) -> Any:
    """The VAE in float32, as the server would build it."""
    import torch

    from diffusion.components import build_module

    tensors = read_headers(sorted(folder.glob("*.safetensors")), label)
    configs = {_CONFIG: json.dumps(config).encode()}
    try:
        vae = build_module(VAE, ("diffusers", CLASS_NAME), configs)
    except ModelError as error:
        raise UsageError(f"{label}: {error}") from error
    fill(vae, tensors, label, torch.float32)
    return vae
