"""The manifest: what a published version holds, and the digests by which every byte of it is checked.

A version's name is derived from the manifest's content, so a reader that knows the name can tell a manifest that
was tampered with or mixed up from the one that was published. The recipe travels as opaque JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from weights.chunks import CHUNK_SIZE, chunk_count
from weights.errors import ManifestError

FORMAT: Final = "lightning-in-a-bucket/manifest/1"
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest.json"
RECIPE_DEPTH = 64  # levels; pydantic writes no more than 255, and json follows about 990
PUBLISH_AGAIN = "Publish the model again"
PROBLEM_LENGTH = 1000  # characters; what is wrong may be 64 MB long
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_VERSION = re.compile(r"[0-9a-f]{32}")


def is_version(text: str) -> bool:
    """Whether `text` has the form of a version's name: 32 hexadecimal digits, 128 bits of a SHA-256."""
    return _VERSION.fullmatch(text) is not None


def is_pickle(path: str) -> bool:
    """Whether the file is of a kind that runs code when it is opened; such files are never read or published."""
    return path.lower().endswith(PICKLE_SUFFIXES)


def check_path(path: str) -> str:
    """Return `path` if it is a plain relative one that no system reads as leading elsewhere, else raise ValueError."""
    parts = path.split("/")
    if (
        not path
        or len(path) > 512
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(character) < 32 or character in '\\:*?"<>|' for character in path)
        or len(path.encode()) > 512
    ):
        raise ValueError(f"{path!r} is not a plain path inside the model's folder")
    return path


def _check_publishable(path: str) -> str:
    check_path(path)
    if is_pickle(path):
        raise ValueError(
            f"{path!r} may hold a pickle, which is never opened: publish safetensors instead"
        )
    if any(part.startswith(".") for part in path.split("/")):
        raise ValueError(f"{path!r} is hidden, and hidden files are never published")
    if path.casefold() in (MANIFEST_NAME, LATEST_NAME):
        raise ValueError(f"{path!r} is a name of the bucket's own layout")
    return path


def check_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return `recipe` if it can be written as JSON and read back the same, else raise ValueError."""
    level: list[Any] = [recipe]
    for _ in range(RECIPE_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError(f"is nested more than {RECIPE_DEPTH} levels deep")
    # Neither NaN nor a lone surrogate is JSON, though Python's parser takes both.
    json.dumps(recipe, allow_nan=False, ensure_ascii=False).encode()
    return recipe


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Fields(BaseModel):
    """Fields as published: none may be added, and none changed later."""

    model_config = ConfigDict(frozen=True)

    # pydantic's own extra="forbid" describes every one, and a manifest has room for millions.
    @model_validator(mode="before")
    @classmethod
    def _no_more_than_these(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            for name in fields:
                if name not in cls.model_fields:
                    raise ValueError(f"{name!r} does not belong there")
        return fields


class FileEntry(Fields):
    """One file: its path inside the model, its size in bytes, its SHA-256, and the BLAKE3 of every chunk."""

    path: Annotated[str, AfterValidator(_check_publishable)]
    size: int = Field(ge=0, strict=True)
    sha256: HexDigest
    chunks: Annotated[tuple[HexDigest, ...], FailFast()]

    @model_validator(mode="after")
    def _one_digest_a_chunk(self) -> FileEntry:
        expected = chunk_count(self.size)
        if len(self.chunks) != expected:
            raise ValueError(
                f"{self.path!r} has {len(self.chunks)} chunk digests where {self.size} bytes need {expected}"
            )
        return self


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


class Manifest(Fields):
    """What one immutable version of a model holds."""

    format: Literal["lightning-in-a-bucket/manifest/1"] = FORMAT
    version: str = Field(pattern=r"^[0-9a-f]{32}$")
    chunk_size: Literal[16777216] = CHUNK_SIZE
    files: Annotated[tuple[FileEntry, ...], FailFast()] = Field(min_length=1)
    recipe: Annotated[dict[str, Any], AfterValidator(check_recipe)]

    @model_validator(mode="after")
    def _is_what_was_published(self) -> Manifest:
        # As the least particular file system sees them, where A and a are one file and a file is no folder.
        paths = {entry.path.casefold() for entry in self.files}
        if len(paths) != len(self.files):
            raise ValueError("a path is listed twice")
        for path in paths:
            if any(parent in paths for parent in _parents(path)):
                raise ValueError(f"{path!r} lies in a folder that is listed as a file")
        expected = derive_version(self.files, self.recipe)
        if self.version != expected:
            raise ValueError(
                f"its content belongs to version {expected}, not {self.version}: it was altered after publishing"
            )
        return self

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


def derive_version(files: Iterable[FileEntry], recipe: Mapping[str, Any]) -> str:
    """Name the version after all it holds: the first 32 hexadecimal digits of SHA-256 over canonical JSON."""
    content = {
        "format": FORMAT,
        "files": sorted((entry.path, entry.size, entry.sha256, entry.chunks) for entry in files),
        "recipe": recipe,
    }
    return hashlib.sha256(_canonical(content)).hexdigest()[:32]


def make_manifest(files: Iterable[FileEntry], recipe: Mapping[str, Any]) -> Manifest:
    """Put files and recipe together under the name their content gives them. Raises ManifestError."""
    ordered = tuple(sorted(files, key=lambda entry: entry.path))
    # Through JSON and back: what is hashed is what a reader will see, whatever types the caller used.
    try:
        plain_recipe = check_recipe(json.loads(json.dumps(recipe)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"the recipe to publish cannot be written as JSON: {error}. Give it plain values"
        ) from None
    fields = {
        "version": derive_version(ordered, plain_recipe),
        "files": ordered,
        "recipe": plain_recipe,
    }
    return _validated(fields, "the manifest to publish")


def dump_manifest(manifest: Manifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"


def parse_manifest(data: bytes, where: str, *, advice: str = PUBLISH_AGAIN) -> Manifest:
    """Read a manifest that came from `where`. Raises ManifestError: what is wrong with it, and `advice`."""
    return _validated(_json_object(data, where, advice), where, advice)


def dump_latest(version: str) -> bytes:
    return json.dumps({"version": version}).encode() + b"\n"


def parse_latest(data: bytes, where: str) -> str:
    """Return the version that latest.json names. Raises ManifestError."""
    version = _json_object(data, where).get("version")
    if not isinstance(version, str) or not is_version(version):
        raise ManifestError(
            f"{where} does not name a version (32 hexadecimal digits). Point it at one with "
            "`python -m weights activate MODEL_PATH VERSION`, or publish the model again"
        )
    return version


def _json_object(data: bytes, where: str, advice: str = PUBLISH_AGAIN) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not valid JSON ({error}). {advice}") from None
    if not isinstance(value, dict):
        raise ManifestError(f"{where} is not a JSON object. {advice}")
    return value


def _validated(fields: Mapping[str, Any], where: str, advice: str = PUBLISH_AGAIN) -> Manifest:
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    problems = "; ".join(_problem(detail) for detail in details[:3])
    more = f"; and {len(details) - 3} more" if len(details) > 3 else ""
    raise ManifestError(f"{where} is refused: {problems}{more}. {advice}") from None


def _problem(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    problem = f"{place}: {message}" if place else message
    return problem if len(problem) <= PROBLEM_LENGTH else f"{problem[:PROBLEM_LENGTH]}…"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
