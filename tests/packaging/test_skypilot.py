"""skypilot.yaml through SkyPilot's own parser, and its readiness probe against the real gateway.

SkyPilot lives in .venv-sky, made by `make test`; nothing here reaches a cloud.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.gateway_server import GatewayServer, small_runner

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "skypilot.yaml"
SKY_PYTHON = ROOT / ".venv-sky/bin/python"
KEYS = [
    "AWS_ACCESS_KEY_ID=tid_example",
    "AWS_SECRET_ACCESS_KEY=tsec_example",
    "API_KEYS=alice:0000",
]
IMAGE = "docker:your-docker-username/sdxl-tigris"


def parse(home: Path, *tasks: Path) -> list[dict[str, Any]]:
    if not SKY_PYTHON.exists():
        reason = "SkyPilot is not installed in .venv-sky: run `make test`"
        if os.environ.get("REQUIRE_SYSTEM_PROGRAMS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    parsed = subprocess.run(
        [SKY_PYTHON, ROOT / "tests/packaging/sky_parse.py", *KEYS, *tasks],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert parsed.returncode == 0, parsed.stderr
    results: list[dict[str, Any]] = json.loads(parsed.stdout)
    return results


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """skypilot.yaml as it stands, and with its commented image uncommented. One slow start for both."""
    home = tmp_path_factory.mktemp("home")
    text = TASK.read_text(encoding="utf-8")
    commented = f"  # image_id: {IMAGE}\n"
    assert commented in text
    with_image = home / "skypilot.yaml"
    with_image.write_text(text.replace(commented, f"  image_id: {IMAGE}\n"))
    return parse(home, TASK, with_image)


@pytest.fixture
def checkout(both_ways: list[dict[str, Any]]) -> dict[str, Any]:
    return both_ways[0]


def test_the_way_without_an_image_copies_the_checkout_and_opens_one_port(
    checkout: dict[str, Any],
) -> None:
    assert set(checkout["images"]) == {None}
    assert checkout["workdir"] == "."
    assert checkout["ports"] == [checkout["envs"]["PORT"]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="SkyPilot asks git what is ignored")
def test_what_the_server_needs_is_copied_and_what_make_made_is_not(
    checkout: dict[str, Any],
) -> None:
    left_behind = tuple(checkout["excluded"])

    assert ".venv-sky/" in left_behind
    for needed in (
        "predict.py",
        "requirements.txt",
        ".cog/openapi_schema.json",
        "weights/__init__.py",
        "diffusion/__init__.py",
        "images/__init__.py",
        "gateway/__init__.py",
        "gateway/page/index.html",
    ):
        assert (ROOT / needed).exists()
        assert not needed.startswith(left_behind)


def test_the_keys_are_secrets_and_never_environment(checkout: dict[str, Any]) -> None:
    assert set(checkout["secrets"]) == {"API_KEYS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert not [name for name in checkout["envs"] if "KEY" in name]


def test_the_server_is_told_what_a_cog_image_has_baked_in(checkout: dict[str, Any]) -> None:
    decorator = re.search(r"@concurrent\(max=(\d+)\)", (ROOT / "predict.py").read_text())
    cog = yaml.safe_load((ROOT / "cog.yaml").read_text())

    assert decorator is not None
    assert checkout["envs"]["COG_MAX_CONCURRENCY"] == decorator[1]
    assert checkout["envs"]["COG_PREDICT_TYPE_STUB"] == cog["run"]


def test_the_way_with_an_image_is_one_line_more(both_ways: list[dict[str, Any]]) -> None:
    checkout, image = both_ways

    assert all(IMAGE in json.dumps(image_id) for image_id in image["images"])
    assert {**image, "images": None} == {**checkout, "images": None}


@pytest.fixture
def probe_path() -> str:
    path: str = yaml.safe_load(TASK.read_text())["service"]["readiness_probe"]["path"]
    return path


def test_the_callers_keys_are_what_opens_the_door(checkout: dict[str, Any]) -> None:
    assert "ALLOW_ANONYMOUS" not in checkout["envs"]
    assert "exec python -m gateway" in TASK.read_text()


def test_a_replica_is_ready_once_the_model_is_loaded_and_not_before(
    gateway_environment: dict[str, str], tmp_path: Path, probe_path: str
) -> None:
    held = tmp_path / "held"
    held.touch()
    environment = {**gateway_environment, "HOLD_SETUP": str(held)}
    runner = small_runner(tmp_path / "runner")
    with GatewayServer(environment, runner, wait_until_ready=False) as gateway:
        assert gateway.get(probe_path).status_code == 503
        held.unlink()
        gateway.until(lambda: gateway.get(probe_path).status_code == 200)


def test_a_replica_that_could_not_load_is_never_ready(
    gateway_environment: dict[str, str], tmp_path: Path, probe_path: str
) -> None:
    environment = {**gateway_environment, "FAIL_SETUP": "1"}
    runner = small_runner(tmp_path / "runner")
    with GatewayServer(environment, runner, wait_until_ready=False) as gateway:
        gateway.until(lambda: gateway.get("/status").json()["state"] == "setup_failed")
        assert gateway.get(probe_path).status_code == 503
