"""From a single-file checkpoint to a plan: the weights are in the file, everything else comes from a base.

The base is a diffusers repo or folder of the same family: what --base names, else the file's own repo or folder where
that is a whole model, else the one that diffusers itself takes configs from for checkpoints of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.families import ARCHITECTURES, Architecture, family_of
from diffusion.recipe import Recipe, Source, lightning_recipe
from preparation.checkpoint import Checkpoint
from preparation.errors import UsageError
from preparation.folder import LocalFolder
from preparation.hub import Hub, HubRepo
from preparation.lightning import steps_of
from preparation.origin import Origin
from preparation.plan import (
    RECIPE_NAME,
    SCHEDULER_PATH,
    Component,
    Plan,
    as_family,
    component_of,
    copies_of,
    open_model_index,
    published_texts,
    read_configs,
    read_recipe,
    recipe_from_configs,
)
from preparation.select import select

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def plan_single_file(checkpoint: Checkpoint, base: Origin, jobs: int) -> Plan:
    """Plan to take the checkpoint apart, with the base's configs and tokenizers.

    Required components that the file lacks are the base's own; what a pipeline can do without is left out where either
    lacks it. It is run as the file's own repo is, else as the base is.

    Raises:
        UsageError: the base is no diffusers model that can be served, or the checkpoint lacks its denoiser.
    """
    index = open_model_index(base)
    architecture = ARCHITECTURES[index["_class_name"]]
    held = checkpoint.held(architecture)
    if architecture.denoiser not in held:
        raise UsageError(
            f"{checkpoint.label} holds no {architecture.denoiser} as a {architecture.pipeline} has it, which "
            f"{base.label} is. Give a checkpoint that does, or with --base the model whose configs it follows."
        )
    held = {
        module: size
        for module, size in held.items()
        if module not in _left_out(index, architecture)
    }
    if checkpoint.kind not in (None, *architecture.single_file.kinds):
        raise UsageError(
            f"{checkpoint.label} is not of the family of {base.label}, a {architecture.pipeline}: diffusers takes it "
            f"for {checkpoint.kind!r}. Name another --base, or leave it out."
        )
    index = _without_absent(index, architecture, held)
    selection = select(base.files, index, base.label, elsewhere=held)
    configs = read_configs(base, selection.configs, jobs)
    given = _given(checkpoint, base)
    if given and given.pipeline != architecture.pipeline:
        raise UsageError(
            f"{RECIPE_NAME} beside {checkpoint.label} or in {base.label} is for a {given.pipeline}, and the model is a "
            f"{architecture.pipeline}. Correct it, or take it away."
        )
    with_index = {**configs, "model_index.json": base.read("model_index.json")}
    recipe = given or _recipe(checkpoint, base, with_index)
    recipe = recipe.model_copy(update={"source": _source(checkpoint, base)})
    texts = published_texts(index, configs[SCHEDULER_PATH], recipe)
    return Plan(
        source=checkpoint.label,
        texts=texts,
        copies=copies_of(base, selection, texts),
        components=(
            *(
                Component(
                    module,
                    _STEMS[architecture.modules[module][0]],
                    checkpoint.origin,
                    (checkpoint.path,),
                    inside=size,
                )
                for module, size in held.items()
            ),
            *(component_of(chosen, base) for chosen in selection.weights),
        ),
        recipe=recipe,
        recipe_is_given=given is not None,
    )


def find_base(checkpoint: Checkpoint, hub: Hub) -> Origin:
    """Where configs and tokenizers come from when nobody says it.

    Raises:
        UsageError: the checkpoint is of no family that can be served.
        PreparationError: the Hub cannot be reached.
    """
    if beside := _beside(checkpoint):
        return beside
    kind = checkpoint.kind
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    usual = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind or "", {}).get(
        "pretrained_model_name_or_path"
    )
    known = [one for found in ARCHITECTURES.values() for one in found.single_file.kinds]
    if kind not in known or usual is None:
        what = f"like {usual}" if usual else "of a kind that diffusers does not recognise"
        served = ", ".join(
            DIFFUSERS_DEFAULT_PIPELINE_PATHS[one]["pretrained_model_name_or_path"] for one in known
        )
        raise UsageError(
            f"{checkpoint.label} is a single-file checkpoint {what}, which cannot be served. Those that can be are "
            f"like {served}. If it is a finetune of one of them, name that with --base."
        )
    try:
        return hub.open(usual)
    except UsageError as error:
        raise UsageError(
            f"{error} It is asked for the configs and tokenizers of {checkpoint.label}; --base names another repo or "
            "a folder to take them from."
        ) from error


def _beside(checkpoint: Checkpoint) -> Origin | None:
    """The file's own repo or folder, where that is a whole model."""
    origin = checkpoint.origin
    if isinstance(origin, HubRepo):
        return origin if "model_index.json" in origin.files else None
    folder = origin.home
    return LocalFolder.open(folder) if (folder / "model_index.json").is_file() else None


def _left_out(index: Mapping[str, Any], architecture: Architecture) -> frozenset[str]:
    """What the base does without: there is neither a config nor a tokenizer for it, whatever the file holds."""
    return frozenset(
        name for name in architecture.optional if index.get(name) in (None, [None, None])
    )


def _without_absent(
    index: Mapping[str, Any], architecture: Architecture, held: Mapping[str, int]
) -> dict[str, Any]:
    """The index, less what the pipeline can do without and the file does not hold, and less its tokenizer."""
    absent = architecture.optional & (architecture.modules.keys() - held.keys())
    tokenizers = {
        name for name, tokenizer in architecture.tokenizers.items() if tokenizer.encoder in absent
    }
    return {
        name: [None, None] if name in absent | tokenizers else value
        for name, value in index.items()
    }


def _recipe(checkpoint: Checkpoint, base: Origin, configs: Mapping[str, bytes]) -> Recipe:
    recipe = recipe_from_configs(configs, base.label)
    if steps := steps_of(checkpoint.path.rpartition("/")[2]):
        lightning = lightning_recipe(steps, dtype=recipe.dtype)
        return lightning.model_copy(update={"native_size": recipe.native_size})
    recipe = _predicting_velocity(recipe, checkpoint)
    repo = checkpoint.origin.repo_id if isinstance(checkpoint.origin, HubRepo) else ""
    family = family_of(repo) or (family_of(base.repo_id) if isinstance(base, HubRepo) else None)
    return as_family(recipe, family, checkpoint.label) if family else recipe


def _predicting_velocity(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """Finetunes of SDXL that were trained to predict velocity say so by tensors without a use, which ComfyUI heeds."""
    if "v_pred" not in checkpoint.tensors:
        return recipe
    config = {**recipe.scheduler.config, "prediction_type": "v_prediction"}
    if "ztsnr" in checkpoint.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = recipe.scheduler.model_copy(update={"config": config})
    return recipe.model_copy(update={"scheduler": scheduler})


def _given(checkpoint: Checkpoint, base: Origin) -> Recipe | None:
    """The recipe.json beside the file, or the base's."""
    beside = checkpoint.origin
    if isinstance(beside, LocalFolder) and (beside.root / RECIPE_NAME).is_file():
        beside = LocalFolder.of_file(beside.root / RECIPE_NAME)
    return read_recipe(beside) or read_recipe(base)


def _source(checkpoint: Checkpoint, base: Origin) -> Source:
    """A file on this disk gives its name; where a person keeps it is nobody's business."""
    of_base = (
        f"{base.repo_id}@{base.commit}" if isinstance(base, HubRepo) else Path(base.label).name
    )
    origin = checkpoint.origin
    if not isinstance(origin, HubRepo):
        return Source(parts=(checkpoint.path, of_base))
    part = f"{origin.repo_id}@{origin.commit}:{checkpoint.path}"
    return Source(
        repo=origin.repo_id,
        revision=origin.commit,
        licence=origin.licence,
        parts=(part, of_base) if base is not origin else (part,),
    )
