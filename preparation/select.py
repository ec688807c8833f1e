"""Which files of a diffusers folder a pipeline needs: a pure decision over names and sizes, without any reading.

Weights are only ever taken as safetensors. Pickles (.bin, .ckpt, .pt) can run code when opened, so a component that
has nothing else is refused here, before a byte of it is fetched.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.families import ARCHITECTURES, PREVIEW_VAE
from preparation.errors import UsageError
from weights.manifest import is_pickle

# Half the bytes of the plain set for the same images on a GPU, so it comes first.
VARIANTS = ("fp16", "")
TOKENIZER_SUFFIXES = (".json", ".txt")

# Names as diffusers and transformers write them: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`,
# and the older `model-00001-of-00002.fp16.safetensors`.
_WEIGHTS_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>[a-z0-9_]+))?"
    r"(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?"
    r"(?:\.(?P<old_variant>[a-z0-9_]+))?"
    r"\.safetensors"
)


@dataclass(frozen=True)
class WeightSet:
    """The safetensors files that together are one component's weights, in shard order."""

    component: str
    stem: str  # what the published file is called, before any shard number: "model"
    files: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What a pipeline needs of a folder."""

    configs: tuple[str, ...]  # JSON and tokenizer text, model_index.json not among them
    weights: tuple[WeightSet, ...]


def read_model_index(data: bytes, where: str) -> dict[str, Any]:
    """Parse a model_index.json and check that its pipeline is one this project can run.

    Raises:
        UsageError: it is no JSON object, or names another pipeline, or a part of another class.
    """
    try:
        index = json.loads(data)
    except ValueError as error:
        raise UsageError(
            f"Reading model_index.json of {where}: it is not JSON ({error}). Is the download or checkout complete?"
        ) from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UsageError(
            f"{where} is a {name or 'folder without a pipeline class'} (so says its model_index.json), "
            f"which is not supported. Supported pipelines: {', '.join(ARCHITECTURES)}."
        )
    for part, (_, class_name) in ARCHITECTURES[name].modules.items():
        entry = index.get(part)
        asked = entry[-1] if isinstance(entry, list) and entry else None
        if asked not in (None, class_name):
            raise UsageError(
                f"model_index.json of {where} asks for {part} to be an {asked}, where a {name} is served with "
                f"{class_name} alone. Put one of these in its place, and say so there."
            )
    return dict(index)


def published_model_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """The model_index.json of what gets published: components that are left behind become `[null, null]`."""
    kept = ARCHITECTURES[index["_class_name"]].components
    return {
        key: [None, None] if isinstance(value, list) and key not in kept else value
        for key, value in index.items()
    }


def select(
    files: Iterable[str], index: Mapping[str, Any], where: str, elsewhere: Collection[str] = ()
) -> Selection:
    """Choose the files that the pipeline of `index` needs, and the tiny VAE beside it where there is one.

    Args:
        files: every path in the repo or folder, with forward slashes.
        index: its model_index.json, as `read_model_index` returned it.
        where: what to call the repo or folder in a message.
        elsewhere: components whose weights come from another place, and only their configs from here.

    Raises:
        UsageError: a component is missing, incomplete, or there only as a pickle.
    """
    listing = frozenset(files)
    configs: list[str] = []
    weights: list[WeightSet] = []
    architecture = ARCHITECTURES[index["_class_name"]]
    for component in architecture.components:
        entry = index.get(component)
        if component in architecture.optional and entry in (None, [None, None]):
            continue
        if not isinstance(entry, list) or not all(isinstance(part, str) for part in entry):
            raise UsageError(
                f"model_index.json of {where} lists no {component}, which the pipeline needs. "
                "Is this a complete text-to-image model?"
            )
        if component in architecture.tokenizers:
            configs += _tokenizer_files(listing, component, where)
        elif component == "scheduler":
            configs.append(_required(listing, "scheduler/scheduler_config.json", where))
        else:
            configs.append(_required(listing, f"{component}/config.json", where))
            if component not in elsewhere:
                weights.append(select_weights(listing, component, where))
    if f"{PREVIEW_VAE}/config.json" in listing:
        configs.append(f"{PREVIEW_VAE}/config.json")
        weights.append(select_weights(listing, PREVIEW_VAE, where))
    return Selection(tuple(configs), tuple(weights))


def select_weights(files: Iterable[str], component: str, where: str, folder: str = "") -> WeightSet:
    """Choose one complete safetensors set of a component: the fp16 variant, else the plain one.

    Args:
        component: what the set is of, as model_index.json calls it.
        folder: where in the listing it lies, when that is not the folder of the component's own name.

    Raises:
        UsageError: there is no complete set.
    """
    prefix = "" if folder == "." else f"{folder or component}/"
    names = {path[len(prefix) :] for path in files if path.startswith(prefix)}
    names = {name for name in names if "/" not in name}
    sets: dict[tuple[str, str], dict[tuple[int, int], str]] = defaultdict(dict)
    for name in sorted(names):
        match = _WEIGHTS_NAME.fullmatch(name)
        if match:
            variant = match["variant"] or match["old_variant"] or ""
            place = (int(match["number"] or 1), int(match["count"] or 1))
            sets[match["stem"], variant][place] = name
    problems: list[str] = []
    for variant in VARIANTS:
        for stem in ("diffusion_pytorch_model", "model"):
            chosen, problem = _complete_set(sets.get((stem, variant), {}))
            if chosen:
                return WeightSet(component, stem, tuple(prefix + name for name in chosen))
            if problem:
                problems.append(f"{prefix}{stem}: {problem}")
    raise UsageError(_no_weights(names, prefix, component, where, problems))


def _complete_set(shards: Mapping[tuple[int, int], str]) -> tuple[list[str], str]:
    """The files of a set in order, or why it is incomplete ("" where there is none at all)."""
    if (1, 1) in shards:
        return [shards[1, 1]], ""
    for count in sorted({count for _, count in shards}):
        missing = [number for number in range(1, count + 1) if (number, count) not in shards]
        if not missing:
            return [shards[number, count] for number in range(1, count + 1)], ""
        return [], f"shard {missing[0]} of {count} is missing"
    return [], ""


def _no_weights(
    names: set[str], prefix: str, component: str, where: str, problems: list[str]
) -> str:
    if problems:
        return (
            f"The weights of {component} in {where} are incomplete ({'; '.join(problems)}). "
            "Complete the upload or download, or choose another --revision."
        )
    pickles = sorted(name for name in names if is_pickle(name))
    if pickles:
        return (
            f"{component} in {where} has only pickle weights ({prefix}{pickles[0]}), which can run any code when "
            "opened and are never used here. Convert them to safetensors first: for a Hub repo the Space "
            "huggingface.co/spaces/safetensors/convert opens a pull request, which --revision refs/pr/N then takes; "
            "for a folder, load it in a sandbox and call save_pretrained(…, safe_serialization=True)."
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    seen = f" (there is {prefix}{others[0]}, which is not a name diffusers loads)" if others else ""
    return (
        f"{where} has no safetensors weights for {component} under {prefix or 'its root'}{seen}. "
        "Is this a complete diffusers folder?"
    )


def _tokenizer_files(listing: frozenset[str], component: str, where: str) -> list[str]:
    chosen = sorted(
        path
        for path in listing
        if path.startswith(f"{component}/")
        and path.count("/") == 1
        and path.endswith(TOKENIZER_SUFFIXES)
        and not path.startswith(f"{component}/.")
    )
    if not chosen:
        raise UsageError(
            f"{where} has no files for its {component} under {component}/. Is this a complete diffusers folder?"
        )
    return chosen


def _required(listing: frozenset[str], path: str, where: str) -> str:
    if path not in listing:
        raise UsageError(f"{where} has no {path}, which every diffusers folder of its kind has.")
    return path
