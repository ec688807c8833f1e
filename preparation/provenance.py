"""What a person may want to know of a version years later: the options it was prepared with, the tools' versions."""

from __future__ import annotations

import dataclasses
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

# What reads, converts and writes a model on its way. Versions come from the installed packages' own records: importing
# torch for its version would take seconds.
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub")
# Of a request, what makes no difference to the files it gives.
_INDIFFERENT = frozenset({"name", "folder", "jobs", "repair", "hub"})
_USER_INFO = re.compile(r"(?<=://)[^/@]*@")


def tools() -> dict[str, str]:
    """The versions of Python and of the packages that take part, without those that are not installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def options(request: Any, *, is_folder: bool) -> dict[str, Any]:
    """What was asked for, less what is as it always is. Of a local folder its own name alone: where a person keeps
    their files is nobody's business."""
    asked: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name in _INDIFFERENT or value is None or value == field.default:
            continue
        asked[field.name] = _plain(value)
    if is_folder:
        asked["source"] = Path(request.source).expanduser().resolve().name
    return asked


def _plain(value: Any) -> Any:
    """As JSON has it, without a password that somebody may have put into a URL."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        plain = [_plain(one) for one in value]
        return sorted(plain, key=str) if isinstance(value, set | frozenset) else plain
    return _USER_INFO.sub("", str(value))
