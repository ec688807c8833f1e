"""What will be published and from where: decided from listings and small config files, before any weights move.

A plan names every file of the result. Carrying it out is `assemble`'s, publishing it is the weights room's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusion.errors import ModelError
from diffusion.families import PREVIEW_VAE, PREVIEW_VAE_CLASS, Family, family_of
from diffusion.recipe import Recipe, Source
from preparation.convert import SHARD_LIMIT
from preparation.described import describe_other
from preparation.errors import UsageError
from preparation.lora import Lora
from preparation.origin import Origin
from preparation.patterns import EVERYTHING, Patterns
from preparation.select import (
    Selection,
    WeightSet,
    published_model_index,
    read_model_index,
    select,
    select_weights,
)

RECIPE_NAME = "recipe.json"  # at a local folder's root: how its checkpoint wants to be run
SCHEDULER_PATH = "scheduler/scheduler_config.json"
_FORMAT = 2  # raise it when the same plan gives other bytes than before


@dataclass(frozen=True)
class Copy:
    """A small file taken as it is."""

    target: str
    origin: Origin
    path: str


@dataclass(frozen=True)
class Component:
    """The weights of one component, and what is to be made of them.

    `dtype` is what to cast to (safetensors' name, "F16"), None for as they are. `architecture` is the diffusers class
    to check names and shapes against, where the weights and their config come from different repos. `inside`: the
    one file is a whole model under its authors' own names, and this many bytes of it are the component's.
    """

    name: str
    stem: str
    origin: Origin
    files: tuple[str, ...]
    dtype: str | None = None
    architecture: str | None = None
    inside: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        if self.inside is not None:
            return (self.inside,)
        return tuple(self.origin.files[path] for path in self.files)


@dataclass(frozen=True)
class Plan:
    """A model to be assembled. `recipe_is_given`: the owner wrote it, so the files are held to it.

    `loras` are merged into whatever components they change, in this order.
    """

    source: str
    texts: Mapping[str, bytes]
    copies: tuple[Copy, ...]
    components: tuple[Component, ...]
    recipe: Recipe
    recipe_is_given: bool = False
    loras: tuple[Lora, ...] = ()
    shard_limit: int = SHARD_LIMIT

    def fetched(self) -> list[tuple[Origin, list[str]]]:
        """Every file to be brought onto this disk, once, by origin."""
        by_origin: dict[int, tuple[Origin, dict[str, None]]] = {}
        for origin, paths in [
            *((copy.origin, (copy.path,)) for copy in self.copies),
            *((component.origin, component.files) for component in self.components),
            *((lora.origin, (lora.path,)) for lora in self.loras),
        ]:
            by_origin.setdefault(id(origin), (origin, {}))[1].update(dict.fromkeys(paths))
        return [(origin, list(paths)) for origin, paths in by_origin.values()]

    def fingerprint(self) -> str:
        """The same for two plans that give the same folder."""
        content = {
            "format": _FORMAT,
            "shard_limit": self.shard_limit,
            "texts": {path: hashlib.sha256(data).hexdigest() for path, data in self.texts.items()},
            "copies": {copy.target: copy.origin.fingerprint(copy.path) for copy in self.copies},
            "components": {
                component.name: [
                    component.stem,
                    component.dtype,
                    [component.origin.fingerprint(path) for path in component.files],
                    *(["inside"] if component.inside is not None else []),
                ]
                for component in self.components
            },
            "loras": [[lora.origin.fingerprint(lora.path), lora.weight] for lora in self.loras],
            "recipe": self.recipe.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_mirror(
    origin: Origin,
    source: Source | None,
    jobs: int,
    patterns: Patterns = EVERYTHING,
    given: Recipe | None = None,
) -> Plan:
    """Plan to publish a diffusers folder as it is, less what no pipeline here needs.

    `given` is the recipe where it is known; else the folder's own is taken, or what its configs say.

    Raises:
        UsageError: it is no diffusers folder, not of a supported pipeline, incomplete, or a pattern hides a part that
            the pipeline needs.
    """
    index = open_model_index(origin)
    selection = _select(origin, index, patterns)
    configs = read_configs(origin, selection.configs, jobs)
    given = given or read_recipe(origin)
    with_index = {**configs, "model_index.json": json.dumps(index).encode()}
    recipe = given or recipe_from_configs(with_index, origin.label)
    source = patterns.recorded(source or recipe.source)
    if source is not None:
        recipe = recipe.model_copy(update={"source": source})
        if given is None and (family := family_of(source.repo or "")):
            recipe = as_family(recipe, family, origin.label)
    texts = published_texts(index, configs[SCHEDULER_PATH], recipe)
    return Plan(
        source=origin.label,
        texts=texts,
        copies=copies_of(origin, selection, texts),
        components=tuple(component_of(chosen, origin) for chosen in selection.weights),
        recipe=recipe,
        recipe_is_given=given is not None,
    )


def as_split(plan: Plan) -> Plan:
    """The plan with weight files left as they were split, whatever their size."""
    largest = max(size for component in plan.components for size in component.sizes)
    return replace(plan, shard_limit=max(plan.shard_limit, largest))


def _select(origin: Origin, index: Mapping[str, Any], patterns: Patterns) -> Selection:
    """What of the narrowed listing the pipeline needs: all of its configs, and one complete set of each weights."""
    whole = select(origin.files, index, origin.label)
    if not patterns:
        return whole
    left = patterns.narrow(origin.files)
    if not any(path.startswith(f"{PREVIEW_VAE}/") for path in left):
        # The one part that a pipeline does without: a pattern may leave it behind.
        files = {path for path in origin.files if not path.startswith(f"{PREVIEW_VAE}/")}
        whole = select(files, index, origin.label)
    given = [RECIPE_NAME] if RECIPE_NAME in origin.files else []
    patterns.check(["model_index.json", *whole.configs, *given], origin.label)
    for chosen in whole.weights:
        try:
            select_weights(left, chosen.component, origin.label)
        except UsageError:
            patterns.check(chosen.files, origin.label)
            raise
    return select(left, index, origin.label)


def open_model_index(origin: Origin) -> dict[str, Any]:
    """The origin's model_index.json, checked to be a supported pipeline's."""
    if "model_index.json" not in origin.files:
        raise UsageError(
            f"{origin.label} has no model_index.json, so it is not a diffusers model. {describe_other(origin)}"
        )
    return read_model_index(origin.read("model_index.json"), origin.label)


def read_configs(origin: Origin, paths: Iterable[str], jobs: int) -> dict[str, bytes]:
    """Small files by path, fetched together."""
    fetched = origin.fetch(paths, jobs=jobs, on_bytes=lambda _size: None)
    return {path: origin.read(path) for path in fetched}


def recipe_from_configs(configs: Mapping[str, bytes], label: str) -> Recipe:
    """`Recipe.from_configs`, with the source named in its errors."""
    try:
        return Recipe.from_configs(configs)
    except ModelError as error:
        raise UsageError(f"{label}: {error}") from error


def as_family(recipe: Recipe, family: Family, label: str) -> Recipe:
    """`Recipe.as_family`, with the source named in its errors."""
    try:
        return recipe.as_family(family)
    except ModelError as error:
        raise UsageError(f"{label}: {error}") from error


def read_recipe(origin: Origin) -> Recipe | None:
    """The recipe that the model's owner put beside it, if any."""
    if RECIPE_NAME not in origin.files:
        return None
    try:
        return Recipe.model_validate(json.loads(origin.read(RECIPE_NAME)))
    except (ValueError, ModelError) as error:
        raise UsageError(
            f"{RECIPE_NAME} in {origin.label} cannot be used: {error}. Correct it, or remove it to have the recipe "
            "read from the model's own configs."
        ) from error


def published_texts(index: Mapping[str, Any], scheduler: bytes, recipe: Recipe) -> dict[str, bytes]:
    """model_index.json and the scheduler's config, saying what the recipe says: stock diffusers reads only these."""
    published = published_model_index(index)
    published["scheduler"] = ["diffusers", recipe.scheduler.class_name]
    try:
        config = json.loads(scheduler)
    except ValueError as error:
        raise UsageError(f"{SCHEDULER_PATH} of the source is not JSON ({error}).") from error
    config |= {"_class_name": recipe.scheduler.class_name, **recipe.scheduler.config}
    return {"model_index.json": _dump(published), SCHEDULER_PATH: _dump(config)}


def copies_of(origin: Origin, selection: Selection, texts: Mapping[str, bytes]) -> tuple[Copy, ...]:
    """The selected config files, except those that are written anew."""
    return tuple(Copy(path, origin, path) for path in selection.configs if path not in texts)


def component_of(chosen: WeightSet, origin: Origin) -> Component:
    """The selected weights as they are. A tiny VAE is held to its config, as no pipeline's own loading would."""
    architecture = PREVIEW_VAE_CLASS[1] if chosen.component == PREVIEW_VAE else None
    return Component(chosen.component, chosen.stem, origin, chosen.files, architecture=architecture)


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
