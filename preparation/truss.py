"""The `model_cache` of a Truss config (`hf_cache` in older ones), each entry as the request its own command would make.

The format is that of https://docs.baseten.co/development/model/model-cache. Nothing else of a config concerns a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preparation.errors import PreparationError, UsageError
from preparation.patterns import Patterns
from preparation.plan import Plan
from preparation.prepare import EXPECTED_ERRORS, Request, make_plan
from preparation.source import SourceKind

_NAMES = ("model_cache", "hf_cache")
_KINDS = {"hf": SourceKind.HUB, "s3": SourceKind.S3, "gcs": SourceKind.GCS}
_SIZE_LIMIT = 1_000_000  # bytes; a config is a page or two

Text = Annotated[str, Field(strict=True, min_length=1)]


class _Entry(BaseModel):
    """One entry. What Truss needs beyond where the files are says where it puts them, and has no meaning here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo_id: Text
    revision: Annotated[str, Field(strict=True)] | None = None
    allow_patterns: tuple[Text, ...] | None = None
    ignore_patterns: tuple[Text, ...] | None = None
    kind: Literal["hf", "gcs", "s3", "azure"] | None = None
    use_volume: bool | None = None
    volume_folder: Text | None = None
    runtime_secret_name: Text | None = None


def read_truss(config: Path, defaults: Request) -> list[Request]:
    """A request for each entry, everything an entry does not say taken from `defaults`.

    A model from a bucket is named after its bucket and folder: an entry has no other name for it.

    Raises:
        UsageError: it is no Truss config, has no such block, or an entry is wrong; the message names the entry.
    """
    requests: list[Request] = []
    for number, entry in enumerate(_entries(config), start=1):
        try:
            requests.append(_request(_parse(entry), defaults))
        except UsageError as error:
            raise UsageError(f"{_title(config, number, entry)}: {error}") from error
    _refuse_same_names(config, requests)
    return requests


def plan_truss(config: Path, requests: Sequence[Request]) -> list[Plan]:
    """Plan every entry before anything of the first is downloaded.

    Raises:
        PreparationError: an entry cannot be published; the message names it and says why.
    """
    plans = []
    for number, request in enumerate(requests, start=1):
        try:
            plans.append(make_plan(request))
        except EXPECTED_ERRORS as error:
            title = _title(config, number, {"repo_id": request.source})
            kind = type(error) if isinstance(error, PreparationError) else PreparationError
            raise kind(f"{title} cannot be published, so nothing was: {error}") from error
    return plans


def _entries(config: Path) -> list[Any]:
    content = _load(config)
    found = [name for name in _NAMES if name in content]
    if not found:
        raise UsageError(
            f"{config} has no model_cache, which lists the models of a Truss. Add one, or give the model itself as "
            "SOURCE."
        )
    if len(found) > 1:
        raise UsageError(
            f"{config} has both model_cache and hf_cache, its old name. Keep model_cache alone."
        )
    entries = content[found[0]]
    if entries == []:
        raise UsageError(f"{found[0]} of {config} has no entries: there is nothing to publish.")
    if not isinstance(entries, list):
        raise UsageError(
            f"{found[0]} of {config} is {_kind(entries)}, not a list of entries. Each begins with '- repo_id: '."
        )
    return entries


def _load(config: Path) -> Mapping[str, Any]:
    try:
        with config.open("rb") as file:
            data = file.read(_SIZE_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"Reading {config}: {error.strerror or error}. Check the path.") from error
    if len(data) > _SIZE_LIMIT:
        raise UsageError(f"{config} has more than {_SIZE_LIMIT} bytes: it is no Truss config.")
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{config} is not YAML: {_place(error)}. Correct it.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{config} holds {_kind(content)}, where a Truss config has keys.")
    return content


def _place(error: Exception) -> str:
    """What is wrong and where, without quoting the file, which may hold secrets."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return type(error).__name__


def _parse(entry: Any) -> _Entry:
    if not isinstance(entry, dict):
        raise UsageError(f"it is {_kind(entry)}, where keys such as repo_id belong.")
    try:
        return _Entry.model_validate(entry)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    raise UsageError("; ".join(_problem(problem) for problem in problems) + ".")


def _problem(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name} is missing: where the model is, OWNER/NAME, or a folder in a bucket"
    if problem["type"] == "extra_forbidden":
        return f"{name!r} is no key of an entry (known are {', '.join(_Entry.model_fields)})"
    quoted = (
        " (put it in quotes)" if problem["type"] == "string_type" else ""
    )  # YAML reads 1.0 and no as they look
    message = problem["msg"].removeprefix("Input ").replace("valid tuple", "list")
    return f"{name}: {message}{quoted}"


def _request(entry: _Entry, defaults: Request) -> Request:
    patterns = Patterns(entry.allow_patterns or (), entry.ignore_patterns or ())
    request = replace(
        defaults,
        source=entry.repo_id,
        name=None,
        revision=entry.revision or None,
        patterns=patterns,
    )
    place = request.place
    if place.kind is SourceKind.FOLDER:
        raise UsageError(
            f"{entry.repo_id!r} is neither a Hub repo, which looks like OWNER/NAME, nor in a bucket."
        )
    if entry.kind is not None and _KINDS.get(entry.kind) is not place.kind:
        raise UsageError(f"kind is {entry.kind!r}, but {entry.repo_id} is {place.kind.value}.")
    if place.bucket:
        request = replace(request, name=f"{place.bucket}/{place.prefix}".rstrip("/"))
    _ = request.model_path  # refused with the entry's number where it cannot be one
    return request


def _refuse_same_names(config: Path, requests: Sequence[Request]) -> None:
    seen: dict[str, int] = {}
    for number, request in enumerate(requests, start=1):
        other = seen.setdefault(request.model_path, number)
        if other != number:
            raise UsageError(
                f"Entries {other} and {number} of {config} would both be published as {request.model_path}. Give one "
                "of them its own command, with --name."
            )


def _title(config: Path, number: int, entry: Any) -> str:
    known = entry.get("repo_id") if isinstance(entry, dict) else None
    name = f" ({known})" if isinstance(known, str) and known.isprintable() else ""
    return f"Entry {number}{name} of {config}"


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")
