"""What is installed is said once and exactly: requirements, cog.yaml and what the image leaves out."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
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


# Programs of the image, asked for no more than their help or their imports.
PROGRAMS = [
    ["-c", "import predict"],
    ["-c", "import gateway.server"],
    ["-m", "gateway.keys", "--help"],
    ["-m", "weights", "--help"],
    ["scripts/compile_model.py", "--help"],
]


def as_docker_reads(pattern: str) -> re.Pattern[str]:
    """A pattern of .dockerignore: from the root, where `*` ends at a slash and `**/` is any folders or none."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    return re.compile("".join(meanings.get(part, re.escape(part)) for part in parts))


IGNORED = [
    (as_docker_reads(line.removeprefix("!")), not line.startswith("!"))
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def is_ignored(path: str) -> bool:
    """Whether `docker build` leaves it out: the last pattern that fits it, or a folder it is in, decides."""
    parts = path.split("/")
    places = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    ignored = False
    for pattern, leaves_out in IGNORED:
        if any(pattern.fullmatch(place) for place in places):
            ignored = leaves_out
    return ignored


@pytest.mark.parametrize(
    "needed",
    [
        "predict.py",
        "settings.py",
        "checks.py",
        "loading.py",
        "compiling.py",
        "events.py",
        "s3/__init__.py",
        "requirements.txt",
        ".cog/openapi_schema.json",
        "weights/__init__.py",
        "diffusion/__init__.py",
        "images/__init__.py",
        "gateway/__main__.py",
        "gateway/page/index.html",
        "scripts/compile_model.py",
    ],
)
def test_the_image_keeps_what_the_runner_needs(needed: str) -> None:
    assert (ROOT / needed).exists()
    assert not is_ignored(needed)


@pytest.mark.parametrize("name", ["manifest.json", ".pulled.json", "unet/x.safetensors"])
def test_the_image_keeps_a_model_that_was_pulled_to_be_baked_in(name: str) -> None:
    assert not is_ignored(f"model/{name}")


SECRETS = pytest.mark.parametrize(
    "secret",
    [
        ".env",
        ".env.local",
        "runner.env",
        "gateway/runner.env",
        "gateway.key",
        "deploy/monitoring/gateway.key",
        "iam/runner.local.json",
        "dreamy-xl.safetensors",
        "dreamy-xl.ckpt",
        "dreamy-xl.gguf",
    ],
)


@SECRETS
def test_the_image_takes_no_keys_and_no_stray_weights(secret: str) -> None:
    assert is_ignored(secret)


@SECRETS
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git is asked what it ignores")
def test_git_takes_no_keys_and_no_stray_weights(secret: str) -> None:
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", "--quiet", secret], cwd=ROOT, check=False
    )
    assert asked.returncode == 0


@pytest.mark.parametrize(
    "unneeded",
    [
        ".git/config",
        ".hypothesis/examples",
        ".venv/bin/python",
        ".venv-bench/bin/python",
        "docs/baking.md",
        "preparation/__init__.py",
        "scripts/prepare_model.py",
        "tests/packaging/test_pins.py",
        "weights/__pycache__/fetch.cpython-311.pyc",
    ],
)
def test_the_image_leaves_out_what_it_does_not_need(unneeded: str) -> None:
    assert is_ignored(unneeded)


def test_what_the_image_keeps_imports_nothing_that_it_leaves_out(tmp_path: Path) -> None:
    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(ROOT)
        return [name for name in names if name == "model" or is_ignored(str(inside / name))]

    image = shutil.copytree(ROOT, tmp_path / "src", ignore=left_out)

    for program in PROGRAMS:
        subprocess.run(
            [sys.executable, *program],
            cwd=image,
            env={"PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
            check=True,
        )
