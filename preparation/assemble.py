"""Carrying out a plan: fetch, check, convert, and lay out a plain diffusers folder on this disk.

The folder is built beside its place and moved there when complete, so an interruption leaves the old one or the new
one. A folder that already is what the plan would give is used as it is. Publishing is the weights room's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.families import PREVIEW_VAE
from diffusion.recipe import Recipe
from preparation import convert
from preparation.amounts import human_size
from preparation.errors import PreparationError, UsageError
from preparation.fuse import LoraFile, Loras
from preparation.overflow import VAE, mark_overflow
from preparation.plan import Component, Plan
from preparation.progress import Progress
from preparation.stages import Stage
from preparation.unpack import unpack
from weights.remembered import Remembered

# Hidden, so it is never published. It says that the folder is ours to replace, and from what it was made.
MARKER_NAME = ".prepared.json"
# A shard's header comes on top of its tensors; a file this much over the limit is left as it is.
_HEADER_ALLOWANCE = 10_000_000
_SPACE_MARGIN = 64_000_000
_LINKED_FROM = 1_000_000  # bytes; smaller files are copied
_UNPACKED = ".unpacked"  # in the folder that is being built: a checkpoint's components before what else is done
_BLOCK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Prepared:
    """A plain diffusers folder, ready to be published, and how its checkpoint wants to be run."""

    folder: Path
    recipe: Recipe


def find_prepared(plan: Plan, folder: Path) -> Prepared | None:
    """The folder, if it already is, untouched, what the plan would give."""
    marker = _read_marker(folder)
    if marker is None or marker.get("fingerprint") != plan.fingerprint():
        return None
    if marker["files"] != _state(folder):
        return None
    return Prepared(folder, Recipe.model_validate(marker["recipe"]))


def assemble(plan: Plan, folder: Path, *, jobs: int, progress: Progress) -> Prepared:
    """Make `folder` what the plan describes.

    Raises:
        UsageError: `folder` holds something else, or the source's tensors are not what its configs describe.
        PreparationError: no space, no network, a damaged file.
    """
    prepared = find_prepared(plan, folder)
    if prepared is not None:
        progress.say(f"Already prepared in {folder}")
        return prepared
    if folder.exists() and _read_marker(folder) is None:
        raise UsageError(
            f"{folder} exists and was not made by this script, so it is not replaced. Move it away, or choose "
            "another --destdir."
        )
    with _disk_errors(folder):
        _check_space(plan, folder)
        remembered = digests_of(folder)
        local = _fetch(plan, jobs, progress, remembered)
        building = folder.with_name(f"{folder.name}.partial")
        _remove(building)
        try:
            recipe = _build(plan, local, building, progress)
            _remove(folder)
            building.rename(folder)
            remembered.linked(file.stat() for file in folder.rglob("*") if file.is_file())
        finally:
            _remove(building)
    return Prepared(folder, recipe)


def digests_of(folder: Path) -> Remembered:
    """What is known of the files in a prepared folder, and of those it was made from."""
    return Remembered(folder.with_name(f"{folder.name}.digests.json"))


def is_rewritten(component: Component, plan: Plan) -> bool:
    """Whether the component's files may be converted, as far as their names and sizes tell."""
    may_be_fused = bool(plan.loras) and component.name not in (VAE, PREVIEW_VAE)
    too_large = _is_too_large(component, plan.shard_limit)
    is_unpacked = component.inside is not None
    return component.dtype is not None or may_be_fused or too_large or is_unpacked


def _is_too_large(component: Component, shard_limit: int) -> bool:
    return any(size > shard_limit + min(shard_limit, _HEADER_ALLOWANCE) for size in component.sizes)


Local = Mapping[tuple[int, str], Path]  # by the origin's id and the path in it


def _fetch(plan: Plan, jobs: int, progress: Progress, remembered: Remembered) -> Local:
    fetched = plan.fetched()
    missing = {id(origin): origin.missing(paths) for origin, paths in fetched}
    total = sum(origin.files[path] for origin, _ in fetched for path in missing[id(origin)])
    local: dict[tuple[int, str], Path] = {}
    with progress.stage("Download", total) as stage:
        for origin, paths in fetched:
            found = origin.fetch(paths, jobs=jobs, on_bytes=stage.advance)
            local |= {(id(origin), path): place for path, place in found.items()}
    arrived = [(origin, paths) for origin, paths in fetched if not origin.is_local]
    total = sum(origin.files[path] for origin, paths in arrived for path in paths)
    with progress.stage("Check", total) as stage:
        for origin, paths in arrived:
            places = {path: local[id(origin), path] for path in paths}
            origin.check(places, jobs=jobs, on_bytes=stage.advance, remembered=remembered)
    return local


def _build(plan: Plan, local: Local, building: Path, progress: Progress) -> Recipe:
    building.mkdir(parents=True, exist_ok=True)
    if any(building.iterdir()):
        raise UsageError(
            f"{building} exists and was not made by this script. Move it away, or choose another --destdir."
        )
    _write_marker(building, {"fingerprint": None})
    for target, data in plan.texts.items():
        _target(building, target).write_bytes(data)
    for copy in plan.copies:
        shutil.copyfile(local[id(copy.origin), copy.path], _target(building, copy.target))

    files = {
        component.name: [local[id(component.origin), path] for path in component.files]
        for component in plan.components
    }
    files |= _unpack(plan, files, building, progress)
    tensors: dict[str, list[convert.TensorInfo]] = {}
    for component in plan.components:
        tensors[component.name] = convert.read_headers(files[component.name], _label(component))
        if component.architecture:
            config = _config(building, component.name)
            convert.check_architecture(
                tensors[component.name], config, component.architecture, _label(component)
            )
    recipe = _with_dtype(plan, tensors[plan.recipe.architecture.denoiser])

    loras = _read_loras(plan, local, building)
    fused = loras.components() if loras else frozenset()
    converted = {
        component.name
        for component in plan.components
        if component.name in fused
        or (component.inside is None and _is_too_large(component, plan.shard_limit))
        or convert.needs_cast(tensors[component.name], component.dtype)
    }
    total = sum(sum(info.size for info in tensors[name]) for name in converted)
    with progress.stage("Convert", total) as stage:
        for component in plan.components:
            if component.name in converted:
                merging = loras if component.name in fused else None
                _convert(plan, component, tensors[component.name], building, stage, merging)
    unlinked: list[tuple[Path, Path]] = []
    for component in plan.components:
        if component.name not in converted:
            taken = files[component.name]
            unlinked += _take(component, taken, tensors[component.name], building)
    with progress.stage("Copy", sum(source.stat().st_size for source, _ in unlinked)) as stage:
        for source, place in unlinked:
            _copy(source, place, stage)
    shutil.rmtree(building / _UNPACKED, ignore_errors=True)
    vae = next(component for component in plan.components if component.name == VAE)
    recipe = mark_overflow(building, recipe, _label(vae), progress)
    marker = {
        "fingerprint": plan.fingerprint(),
        "source": plan.source,
        "recipe": recipe.model_dump(mode="json"),
        "files": _state(building),
    }
    _write_marker(building, marker)
    return recipe


def _unpack(
    plan: Plan, files: Mapping[str, list[Path]], building: Path, progress: Progress
) -> dict[str, list[Path]]:
    """Take a single-file checkpoint apart; returns the files of its components, as diffusers has them."""
    inside = [component for component in plan.components if component.inside is not None]
    unpacked: dict[str, list[Path]] = {}
    with progress.stage("Unpack", sum(component.inside or 0 for component in inside)) as stage:
        for component in inside:
            unpacked[component.name] = unpack(
                files[component.name][0],
                component.name,
                plan.recipe.architecture,
                building,
                building / _UNPACKED / component.name,
                stem=component.stem,
                # LoRAs are merged in the precision that the file has.
                dtype=None if plan.loras else component.dtype,
                shard_limit=plan.shard_limit,
                label=f"{_label(component)}: {component.files[0]}",
                on_bytes=stage.advance,
            )
    return unpacked


def _convert(
    plan: Plan,
    component: Component,
    tensors: list[convert.TensorInfo],
    building: Path,
    stage: Stage,
    loras: Loras | None,
) -> None:
    label = _label(component)
    changed = None
    if loras is not None:
        config = _config(building, component.name)
        changed = loras.fused(component.name, tensors, config, label)
    convert.write_shards(
        convert.plan_shards(tensors, component.dtype, plan.shard_limit),
        building / component.name,
        component.stem,
        dtype=component.dtype,
        label=label,
        on_bytes=stage.advance,
        changed=changed,
    )


def _read_loras(plan: Plan, local: Local, building: Path) -> Loras | None:
    if not plan.loras:
        return None
    files = [
        LoraFile(local[id(lora.origin), lora.path], lora.weight, lora.label) for lora in plan.loras
    ]
    configs = {component.name: _config(building, component.name) for component in plan.components}
    return Loras(files, plan.recipe.architecture, configs)


def _config(building: Path, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((building / component / "config.json").read_bytes())
    return config


def _take(
    component: Component, files: list[Path], tensors: list[convert.TensorInfo], building: Path
) -> list[tuple[Path, Path]]:
    """Use the files as they are, under the names diffusers looks for when no variant is asked for.

    Returns those that could not be linked, and where they are to be copied to.
    """
    unlinked = []
    for number, file in enumerate(files, start=1):
        target = building / component.name / convert.shard_name(component.stem, number, len(files))
        if not _link(file.resolve(), target):
            unlinked.append((file, target))
    if len(files) > 1:
        shards = [[info for info in tensors if info.file == file] for file in files]
        convert.write_index(building / component.name, component.stem, shards, None)
    return unlinked


def _link(source: Path, target: Path) -> bool:
    """Make `target` the file `source`, as a copy if that is small; False where a large one cannot be linked."""
    if source.stat().st_size < _LINKED_FROM:
        shutil.copyfile(source, target)
        return True
    try:
        os.link(source, target)
    except OSError:
        return False  # another disk, or a file system without links
    return True


def _copy(source: Path, target: Path, stage: Stage) -> None:
    """In blocks, so that it can be watched and interrupted."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            stage.advance(len(block))


def _with_dtype(plan: Plan, tensors: list[convert.TensorInfo]) -> Recipe:
    """The recipe, saying what the denoiser's files hold: no config of a diffusers folder does."""
    denoiser = plan.recipe.architecture.denoiser
    planned = next(component.dtype for component in plan.components if component.name == denoiser)
    found = planned or convert.dominant_dtype(tensors)
    dtype = convert.TORCH_NAMES.get(found or "")
    if dtype is None:
        raise UsageError(
            f"The {denoiser} of {plan.source} holds {found or 'no floating-point'} tensors. Supported are "
            f"{', '.join(convert.TORCH_NAMES.values())}."
        )
    if plan.recipe_is_given and plan.recipe.dtype != dtype:
        raise UsageError(
            f"recipe.json in {plan.source} says dtype {plan.recipe.dtype}, but its {denoiser} holds {dtype}. "
            "Correct one."
        )
    return plan.recipe.model_copy(update={"dtype": dtype})


def _check_space(plan: Plan, folder: Path) -> None:
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}

    def need(place: Path, size: int) -> None:
        place = _existing(place)
        device = place.stat().st_dev
        places.setdefault(device, place)
        needed[device] = needed.get(device, 0) + size

    destination = _existing(folder).stat().st_dev
    for origin, paths in plan.fetched():
        need(origin.home, sum(origin.files[path] for path in origin.missing(paths)))
    for component in plan.components:
        origin = component.origin
        linked = _existing(origin.home).stat().st_dev == destination
        if not linked or is_rewritten(component, plan):
            need(folder, sum(component.sizes))
        if component.inside is not None and plan.loras:
            need(folder, component.inside)  # before and after the LoRAs
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if size and free < size + _SPACE_MARGIN:
            raise PreparationError(
                f"Preparing {plan.source} needs {human_size(size + _SPACE_MARGIN)} on the disk of {places[device]}, "
                f"which has {human_size(free)} free. Free some, or choose larger disks with --destdir (the prepared "
                "folder, and what comes from a bucket) and HF_HOME (downloads from the Hub)."
            )


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def _target(building: Path, path: str) -> Path:
    target = building / path
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _label(component: Component) -> str:
    return f"{component.name} of {component.origin.label}"


def _state(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, by which a later run sees that nobody touched them."""
    return {
        file.relative_to(folder).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MARKER_NAME
    }


def _read_marker(folder: Path) -> dict[str, object] | None:
    try:
        marker = json.loads((folder / MARKER_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _write_marker(folder: Path, marker: Mapping[str, object]) -> None:
    (folder / MARKER_NAME).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    """Remove a folder of ours; anything else stays and makes the caller fail on it."""
    if _read_marker(folder) is not None:
        shutil.rmtree(folder)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreparationError(
            f"Preparing into {folder}: {error.strerror or error} ({error.filename or folder}). Check the disk and "
            "its permissions, or choose another --destdir."
        ) from error
