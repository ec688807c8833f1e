"""What a source is that is no diffusers pipeline, in words: from its names and its config.json, no more is read."""

from __future__ import annotations

import json

from preparation.errors import PreparationError
from preparation.hub import HubRepo
from preparation.origin import Origin
from weights.manifest import LATEST_NAME

_SHOWN = 5  # folders or files that are named
_MARKS = ("model_index.json", LATEST_NAME)


def describe_other(origin: Origin) -> str:
    """One or two sentences on what is there where no model_index.json is, and where there may be one."""
    if inner := sorted({path.rpartition("/")[0] for path in origin.files if _is_mark(path)}):
        return f"There is one in {_listed(inner)}: give that folder."
    if kind := _kind_of(origin):
        return f"It is {kind}. Give the repo or folder of a whole pipeline."
    top = sorted({path.partition("/")[0] for path in origin.files})
    single = [name for name in top if name.endswith(".safetensors") and name in origin.files]
    if single:
        return (
            f"It holds {single[0]}: if that is all of a model, {_as_source(origin, single[0])}. Else give the repo or "
            "folder of the whole pipeline, with unet/, vae/, text_encoder/ and so on."
        )
    seen = f"It holds {_listed(top)}. " if top else "It is empty. "
    return f"{seen}Give the repo or folder of the whole pipeline, with unet/, vae/ and so on."


def _as_source(origin: Origin, file: str) -> str:
    if isinstance(origin, HubRepo):
        return f"give {origin.repo_id}:{file}"
    return f"give {origin.home / file}" if origin.is_local else "download it and give the file"


def _is_mark(path: str) -> bool:
    return "/" in path and path.rpartition("/")[2] in _MARKS


def _kind_of(origin: Origin) -> str | None:
    """What its config.json says that it is, as diffusers and transformers write it."""
    if "config.json" not in origin.files:
        return None
    try:
        config = json.loads(origin.read("config.json"))
    except (ValueError, PreparationError):
        return None
    if not isinstance(config, dict):
        return None
    name = config.get("_class_name")
    if isinstance(name, str) and name.isidentifier():
        return f"a single component, {name}"
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and str(architectures[0]).isidentifier():
        return f"a transformers model, {architectures[0]}"
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
