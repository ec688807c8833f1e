"""The house's import rule: doors import rooms, rooms import s3 and settings, and never the other way.

The rule is read from the source of every file; what a module drags in at import time is asked of a
fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = {"checks", "settings", "s3"}
ROOMS = {"weights", "diffusion", "images", "preparation"}
DOORS = {"predict", "loading", "compiling", "events", "gateway", "scripts", "demo", "benchmarks"}
OURS = BASE | ROOMS | DOORS | {"tests"}

# Beside itself, what each may import of ours. Tests may import everything; nothing may import tests.
MAY_IMPORT = {
    "checks": set(),
    "settings": {"checks"},
    "s3": {"settings"},
    "weights": BASE,
    "diffusion": BASE - {"s3"},
    "images": BASE,
    "preparation": BASE | {"weights", "diffusion"},
    **dict.fromkeys(DOORS, BASE | ROOMS),
    # The Runner's own work of loading and of telling, in files of their own.
    "predict": BASE | ROOMS | {"loading", "events"},
    "loading": BASE | ROOMS | {"compiling"},
    # One of them loads a model as a server does, to compile what a server will run.
    "scripts": BASE | ROOMS | {"loading", "compiling"},
    # Benchmarks measure the real start of the real server, on the demo's small model, and write schemas as people do.
    "benchmarks": BASE | ROOMS | {"demo", "loading", "predict", "scripts"},
    # The demo does what a person does, and a person runs the scripts.
    "demo": BASE | ROOMS | {"scripts"},
}

# What a room must never know, whether at import time or later.
HEAVY = {"torch", "diffusers", "transformers"}
S3_LIBRARIES = {"boto3", "botocore", "s3transfer"}
NEVER = {
    "checks": HEAVY | S3_LIBRARIES,
    "settings": HEAVY | S3_LIBRARIES,
    "s3": HEAVY,
    "weights": HEAVY,
    "diffusion": S3_LIBRARIES,
    "images": HEAVY,
    "gateway": HEAVY | S3_LIBRARIES,
}

# Loaded before the weights start to flow, or by tools that must start at once.
LIGHT = [
    "settings",
    "s3",
    "weights",
    "diffusion",
    "diffusion.recipe",
    "diffusion.sizes",
    "images",
    "predict",
]


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, wherever it stands; relative ones are `package`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name.partition(".")[0]) for alias in names)
            case ast.ImportFrom(level=0, module=str() as module):
                yield node.lineno, module.partition(".")[0]
            case ast.ImportFrom():
                yield node.lineno, package


def violations(path: str, source: str) -> list[str]:
    """What a file imports and may not, one line each. `path` is relative to the root."""
    unit = path.partition("/")[0].removesuffix(".py")
    if unit not in MAY_IMPORT:
        return []
    allowed = MAY_IMPORT[unit] | {unit}
    forbidden = (OURS - allowed) | NEVER.get(unit, set())
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(source, unit)
        if name in forbidden
    ]


def source_files() -> list[str]:
    """Every Python file of the repository; .venv and the like begin with a dot."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]


def test_no_file_imports_against_the_direction_of_the_house() -> None:
    files = source_files()

    found = [line for path in files for line in violations(path, (ROOT / path).read_text("utf-8"))]

    assert files
    assert found == []


def test_every_top_level_module_has_its_place_in_the_rule() -> None:
    units = {path.partition("/")[0].removesuffix(".py") for path in source_files()}

    assert units <= OURS, "say in tests/test_imports.py what the new one may import"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("weights/fetch.py", "import torch"),
        ("weights/fetch.py", "from diffusion import recipe"),
        ("weights/deep/inner.py", "def f():\n    import diffusers.loaders"),
        ("diffusion/build.py", "import s3"),
        ("diffusion/build.py", "from botocore.config import Config"),
        ("images/store.py", "from weights import Bucket"),
        ("images/store.py", "if True:\n    from transformers import CLIPTokenizer"),
        ("preparation/hub.py", "import images"),
        ("settings.py", "import s3"),
        ("s3/signing.py", "import weights"),
        ("predict.py", "from demo.s3 import EmbeddedS3"),
        ("scripts/prepare_model.py", "from tests.support import hub"),
        ("demo/s3.py", "import predict"),
    ],
)
def test_the_rule_catches_a_violation(path: str, line: str) -> None:
    assert len(violations(path, line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("weights/fetch.py", "from weights.manifest import Manifest"),
        ("weights/fetch.py", "from . import manifest"),
        ("preparation/plan.py", "from diffusion.recipe import Recipe\nimport weights"),
        ("demo/stages.py", "from scripts.fill_iam import fill"),
        ("predict.py", "import weights, diffusion, images, s3, settings"),
        ("diffusion/build.py", "import torch"),
        ("tests/e2e/test_demo.py", "from demo import s3\nimport predict"),
    ],
)
def test_the_rule_lets_what_is_allowed_through(path: str, line: str) -> None:
    assert violations(path, line) == []


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_no_heavy_library(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([*sys.modules]))"

    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert HEAVY.isdisjoint(json.loads(loaded.stdout.splitlines()[-1]))
