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
from preparation.lightning import is_lightning, steps_of
from preparation.origin import Origin
from preparation.plan import (
    SCHEDULER_PATH,
    Component,
    Plan,
    as_family,
    copies_of,
    open_model_index,
    published_texts,
    read_configs,
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
    index = _without_absent(index, architecture, held)
    selection = select(base.files, index, base.label, elsewhere=held)
    configs = read_configs(base, selection.configs, jobs)
    recipe = _recipe(
        checkpoint, base, {**configs, "model_index.json": base.read("model_index.json")}
    )
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
            *(
                Component(chosen.component, chosen.stem, base, chosen.files)
                for chosen in selection.weights
            ),
        ),
        recipe=recipe,
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
    source = _source(checkpoint, base)
    recipe = recipe.model_copy(update={"source": source})
    repo = source.repo or ""
    if is_lightning(repo) and (steps := steps_of(checkpoint.path)):
        lightning = lightning_recipe(steps, dtype=recipe.dtype, source=source)
        return lightning.model_copy(update={"native_size": recipe.native_size})
    family = family_of(repo) or (family_of(base.repo_id) if isinstance(base, HubRepo) else None)
    return as_family(recipe, family, checkpoint.label) if family else recipe


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
