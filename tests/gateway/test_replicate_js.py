"""Replicate's JavaScript client, as it is, before this server: only where it calls is changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from gateway.keys import digest_of, new_key
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import GatewayServer

pytestmark = [pytest.mark.system_program("node"), pytest.mark.system_program("npm")]

PROGRAM = Path(__file__).parent / "replicate_js"
KEY = new_key()
MODEL, OTHER_MODEL = "test/runner", "test/other"
FOX_URL = "https://images.example/fox-0.png"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the client that its lock file names."""
    folder = tmp_path_factory.mktemp("replicate-js")
    for name in ("package.json", "package-lock.json", "use.js"):
        shutil.copy(PROGRAM / name, folder)
    subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=folder,
        check=True,
    )
    return folder / "use.js"


@pytest.fixture(scope="module")
def told(s3: EmbeddedS3, program: Path, runner_folder: Path) -> Iterator[dict[str, Any]]:
    s3.create_bucket("replicate-js-images")
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": "replicate-js-images",
        "API_KEYS": f"alice:{digest_of(KEY)}",
        "MODEL_PATH": f"{MODEL},{OTHER_MODEL}",
    }
    with GatewayServer(environment, runner_folder) as gateway:
        done = subprocess.run(
            ["node", str(program), f"{gateway.url}/v1", KEY, MODEL, OTHER_MODEL],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        page = subprocess.run(
            ["node", str(written_on_the_page(program.parent, gateway.url))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert page.returncode == 0, page.stderr
        yield json.loads(done.stdout.splitlines()[-1]) | {"page": page.stdout}


def written_on_the_page(folder: Path, url: str) -> Path:
    """The page's program, with the names of this server."""
    page = (REPOSITORY / "docs" / "replicate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```js\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for written, here in [
        ("http://ip:port", url),
        ("YOUR_KEY", KEY),
        ("ByteDance/SDXL-Lightning", MODEL),
    ]:
        assert written in code
        code = code.replace(written, here)
    program = folder / "page.mjs"
    program.write_text(code, encoding="utf-8")
    return program


def test_a_prediction_is_created_polled_and_finished(told: dict[str, Any]) -> None:
    assert told["created"]["status"] == "starting"
    assert told["polled"]["id"] == told["created"]["id"]
    assert told["polled"]["status"] == "succeeded"
    assert told["polled"]["output"] == [FOX_URL]


def test_a_create_that_waits_has_the_end(told: dict[str, Any]) -> None:
    assert told["waited"]["status"] == "succeeded"
    assert told["waited"]["model"] == OTHER_MODEL
    assert told["waited"]["output"] == [FOX_URL]


def test_one_that_takes_too_long_is_cancelled(told: dict[str, Any]) -> None:
    assert told["waitedInVain"]["status"] == "starting"
    assert told["canceled"]["id"] == told["waitedInVain"]["id"]
    assert told["canceled"]["status"] == "canceled"


def test_run_returns_the_output(told: dict[str, Any]) -> None:
    assert told["run"] == [FOX_URL, "https://images.example/fox-1.png"]
    assert told["runPolling"] == [FOX_URL]


def test_the_output_is_streamed_without_the_key(told: dict[str, Any]) -> None:
    """This client does not send its key to a stream's URL."""
    assert told["streamed"] == [["output", FOX_URL], ["done", "{}"]]


def test_all_predictions_are_listed_page_by_page(told: dict[str, Any]) -> None:
    first, second = told["pages"]

    assert len(first) == 20
    assert {told["created"]["id"], told["canceled"]["id"]} <= set(second)
    assert set(first).isdisjoint(second)


def test_models_and_accounts_are_told(told: dict[str, Any]) -> None:
    assert (told["model"]["owner"], told["model"]["name"]) == ("test", "runner")
    assert told["account"]["username"] == "alice"


def test_the_page_s_javascript_works_as_it_stands(told: dict[str, Any]) -> None:
    assert told["page"].count("https://images.example/") == 2


def test_errors_are_the_clients_own(told: dict[str, Any]) -> None:
    assert "Prediction failed" in told["failed"]["message"]
    assert "cannot do that" in told["failed"]["message"]
    assert told["notFound"]["status"] == 404
    assert told["wrongInput"]["status"] == 422
    assert "input.seed" in told["wrongInput"]["message"]
