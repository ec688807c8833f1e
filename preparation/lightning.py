"""SDXL-Lightning, which is no diffusers folder: which parts of which repos make one of it.

Its UNet goes into SDXL base. The VAE is the one finetuned not to overflow in half precision, where the base's
own gives black images (https://huggingface.co/madebyollin/sdxl-vae-fp16-fix).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final, Literal

from diffusion.recipe import Source, lightning_recipe
from preparation.errors import UsageError
from preparation.hub import Hub, HubRepo
from preparation.patterns import EVERYTHING, Patterns
from preparation.plan import (
    Component,
    Copy,
    Plan,
    copies_of,
    open_model_index,
    published_texts,
    read_configs,
    recipe_from_configs,
)
from preparation.select import select, select_weights

LIGHTNING_REPO = "ByteDance/SDXL-Lightning"
BASE_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
VAE_REPO = "madebyollin/sdxl-vae-fp16-fix"
STEPS: Final = 4
_ALL_STEPS: Final[tuple[Literal[1, 2, 4, 8], ...]] = (1, 2, 4, 8)
_STEM = "diffusion_pytorch_model"


def is_lightning(repo_id: str) -> bool:
    """Whether this is the repo that needs assembling; the Hub's names do not depend on case."""
    return repo_id.casefold() == LIGHTNING_REPO.casefold()


def unet_file(steps: int) -> str:
    """The one for a single step predicts the image, which its name says as x0."""
    return f"sdxl_lightning_{steps}step_unet{'_x0' if steps == 1 else ''}.safetensors"


def steps_of(name: str) -> Literal[1, 2, 4, 8] | None:
    """For how many steps a whole single-file checkpoint of the repo is, by its name; None for any other file."""
    for steps in _ALL_STEPS:
        if name == f"sdxl_lightning_{steps}step{'_x0' if steps == 1 else ''}.safetensors":
            return steps
    return None


def lora_file(steps: int) -> str:
    return f"sdxl_lightning_{steps}step_lora.safetensors"


def plan_lightning(
    hub: Hub,
    revision: str | None,
    jobs: int,
    patterns: Patterns = EVERYTHING,
    steps: Literal[1, 2, 4, 8] = STEPS,
) -> Plan:
    """Plan the assembly of the checkpoint for so many steps; `revision` and `patterns` are of the Lightning repo.

    Raises:
        UsageError: one of the repos cannot be read, or no longer holds what is needed, or a pattern hides the UNet.
    """
    lightning = hub.open(LIGHTNING_REPO, revision)
    base = hub.open(BASE_REPO)
    vae = hub.open(VAE_REPO)
    for repo, path in ((lightning, unet_file(steps)), (vae, "config.json")):
        if path not in repo.files:
            raise UsageError(
                f"{repo.repo_id} at {repo.commit} has no {path}. Has the repo changed its layout? "
                "Try an earlier --revision."
            )
    patterns.check([unet_file(steps)], lightning.label)
    index = open_model_index(base)
    selection = select(base.files, index, base.label)
    kept = [path for path in selection.configs if path != "vae/config.json"]
    configs = read_configs(base, kept, jobs)
    configs["vae/config.json"] = vae.read("config.json")
    configs["model_index.json"] = json.dumps(index).encode()

    source = Source(
        repo=lightning.repo_id,
        revision=lightning.commit,
        licence=lightning.licence,
        parts=tuple(f"{repo.repo_id}@{repo.commit}" for repo in (lightning, base, vae)),
    )
    source = patterns.recorded(source) or source
    native_size = recipe_from_configs(configs, base.label).native_size
    recipe = lightning_recipe(steps, source=source).model_copy(update={"native_size": native_size})
    texts = published_texts(index, configs["scheduler/scheduler_config.json"], recipe)
    return Plan(
        source=lightning.label,
        texts=texts,
        copies=(
            *copies_of(base, replace(selection, configs=tuple(kept)), texts),
            Copy("vae/config.json", vae, "config.json"),
        ),
        components=(
            *(
                Component(chosen.component, chosen.stem, base, chosen.files, dtype="F16")
                for chosen in selection.weights
                if chosen.component not in ("unet", "vae")
            ),
            Component("unet", _STEM, lightning, (unet_file(steps),), "F16", "UNet2DConditionModel"),
            _vae(vae),
        ),
        recipe=recipe,
    )


def _vae(repo: HubRepo) -> Component:
    """The repo holds the VAE at its root, in single precision, beside copies for other programs."""
    chosen = select_weights(repo.files, "vae", repo.label, folder=".")
    return Component("vae", _STEM, repo, chosen.files, "F16", "AutoencoderKL")
