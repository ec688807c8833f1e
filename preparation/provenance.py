"""What a person may want to know of a version years later: the options it was prepared with, the tools' versions."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preparation.options import public_name
from preparation.source import SourceKind

if TYPE_CHECKING:
    from preparation.prepare import Request

# What reads, converts and writes a model on its way. Versions come from the installed packages' own records: importing
# torch for its version would take seconds.
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub")
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


def asked_of(request: Request) -> dict[str, Any]:
    """What was asked for, less what is as it always is, and less any password that somebody put into a URL.

    Of a local folder or file its own name alone: where a person keeps their files is nobody's business.
    """
    source = request.source
    if request.place.kind is SourceKind.FOLDER:
        source = Path(source).expanduser().resolve().name
    if request.place.kind is SourceKind.FILE:
        source = Path(source).name
    asked = {
        "source": _USER_INFO.sub("", source),
        "revision": request.revision,
        "base": request.base and public_name(request.base),
        "allow": list(request.patterns.allow),
        "ignore": list(request.patterns.ignore),
        **request.options.recorded(),
    }
    return {name: value for name, value in asked.items() if value}
