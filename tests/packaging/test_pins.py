"""What is installed is said once and exactly: requirements, cog.yaml and what the image leaves out."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(
        line.split("==") if "==" in line else (line, "")
        for line in lines
        if line and not line.startswith("-r ")
    )


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_one_exact_version(name: str) -> None:
    for package, version in pins(name).items():
        assert re.fullmatch(r"[0-9][0-9A-Za-z.]*", version), f"{name}: {package}"


def installed_with(requirements: Iterable[Requirement]) -> set[str]:
    """The canonical names of these and of everything they need here, as far as it is installed."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return found


def requirements_of(pinned: Mapping[str, str]) -> list[Requirement]:
    return [Requirement(f"{package}=={version}") for package, version in pinned.items()]


def test_nothing_is_installed_that_is_not_pinned() -> None:
    runtime = pins("requirements.txt")
    development = runtime | pins("requirements-dev.txt")
    # torch names these exactly, and which ones depends on the machine.
    by_torch = re.compile(r"nvidia-|cuda-|triton")

    for pinned in (runtime, development):
        names = {canonicalize_name(requirement.name) for requirement in requirements_of(pinned)}
        missing = installed_with(requirements_of(pinned)) - names
        assert not [name for name in missing if not by_torch.match(name)]


def test_cog_yaml_builds_what_the_repository_holds() -> None:
    cog = yaml.safe_load((ROOT / "cog.yaml").read_text())
    file, _, class_name = cog["run"].partition(":")
    module = ast.parse((ROOT / file).read_text())

    assert class_name in [node.name for node in module.body if isinstance(node, ast.ClassDef)]
    assert cog["build"]["python_requirements"] == "requirements.txt"
    assert cog["build"]["sdk_version"] == pins("requirements.txt")["cog"]
    assert cog["build"]["gpu"] is True
    # `predict:` and `concurrency:` still work in Cog 0.23, with a warning that they will not.
    assert set(cog) == {"build", "run"}


@pytest.mark.parametrize(
    "needed",
    [
        "predict.py",
        "settings.py",
        "s3",
        "requirements.txt",
        ".cog/openapi_schema.json",
        "weights/__init__.py",
        "diffusion/__init__.py",
        "images/__init__.py",
    ],
)
def test_the_image_keeps_what_the_runner_needs(needed: str) -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    parts = needed.split("/")
    places = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]

    assert (ROOT / needed).exists()
    assert not [line for line in ignored if any(fnmatch.fnmatch(p, line) for p in places)]
