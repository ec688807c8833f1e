"""LoRAs, as a person names them: which file of which repo or disk, and how strongly it is to act.

Merging them into a model is `fuse`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from preparation.errors import UsageError
from preparation.folder import LocalFolder
from preparation.hub import Hub, HubRepo, is_repo_id
from preparation.origin import Origin

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LoraName:
    """What a person wrote: `REPO`, `REPO:file` or a file on this disk, each with `@weight` where it is not 1."""

    place: str
    file: str | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraName:
        """Read `REPO[:file][@weight]`. Raises UsageError."""
        rest, at, number = text.rpartition("@")
        weight = 1.0
        if at and "/" not in number:  # or it is part of a path
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight) or weight == 0:
                raise UsageError(
                    f"--lora {text!r}: what follows the @ is the weight, a number other than 0, such as @0.8."
                )
        else:
            rest = text
        place, _, file = rest.partition(":")
        if not place:
            raise UsageError(f"--lora {text!r} names nothing: give REPO, REPO:file or a file.")
        return cls(place, file or None, weight)

    @property
    def recorded(self) -> str:
        """As it may be published: without the folder, where it lies on this disk."""
        local = self.file is None and self.place.endswith(SUFFIX)
        return str(replace(self, place=Path(self.place).name)) if local else str(self)

    def __str__(self) -> str:
        file = f":{self.file}" if self.file else ""
        weight = "" if self.weight == 1 else f"@{self.weight:g}"
        return f"{self.place}{file}{weight}"


@dataclass(frozen=True)
class Lora:
    """A LoRA's file at its origin, and the weight that its deltas are multiplied with."""

    origin: Origin
    path: str
    weight: float

    @property
    def label(self) -> str:
        return f"{self.origin.label}: {self.path}"

    @property
    def part(self) -> str:
        """What it adds to a model's source, for its manifest; of a file on this disk its name alone."""
        at = (
            f"{self.origin.repo_id}@{self.origin.commit}:"
            if isinstance(self.origin, HubRepo)
            else ""
        )
        return f"{at}{self.path} x {self.weight:g}"


def on_this_disk(place: str) -> Path:
    """The path, with a home folder in the place of ~. Raises UsageError for the home of nobody known."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{place}: {error}.") from error


def find_lora(name: LoraName, hub: Hub) -> Lora:
    """Look the file up. Raises UsageError where there is none, several, or only a pickle."""
    local = on_this_disk(name.place)
    if name.file is None and local.suffix == SUFFIX and local.is_file():
        folder = LocalFolder.of_file(local)
        return Lora(folder, local.name, name.weight)
    if not is_repo_id(name.place):
        raise UsageError(
            f"--lora {name}: there is no file {local}, and {name.place!r} is not OWNER/NAME of a Hub repo."
        )
    repo = hub.open(name.place)
    return Lora(repo, _file_of(repo, name), name.weight)


def _file_of(repo: HubRepo, name: LoraName) -> str:
    candidates = sorted(path for path in repo.files if path.endswith(SUFFIX))
    if name.file is not None:
        if name.file not in repo.files:
            seen = f" It has {_listed(candidates)}." if candidates else ""
            raise UsageError(f"--lora {name}: {repo.repo_id} has no file {name.file}.{seen}")
        if not name.file.endswith(SUFFIX):
            raise UsageError(
                f"--lora {name}: {name.file} is no safetensors file, and nothing else is ever opened here."
            )
        return name.file
    if not candidates:
        raise UsageError(
            f"--lora {name}: {repo.repo_id} has no safetensors file. Pickles (.bin, .pt, .ckpt) are never opened."
        )
    if len(candidates) > 1:
        raise UsageError(
            f"--lora {name}: {repo.repo_id} has several safetensors files ({_listed(candidates)}). "
            f"Name one, for example --lora {name.place}:{candidates[0]}."
        )
    return candidates[0]


def _listed(paths: list[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (", …" if len(paths) > most else "")
