"""The pages against the code: what a page names is there, and what a person may set is on a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from demo.tutorial import curl_command
from gateway.settings import GatewaySettings
from scripts import generate_schema
from settings import SourceSettings, StorageSettings
from tests.support.cog_server import CogServer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [path for folder in ("", "docs", "deploy/monitoring") for path in (ROOT / folder).glob("*.md")]
)


COUNTS_ITS_INPUTS = """
from cog import BaseRunner


class Runner(BaseRunner):
    async def run(
        self,
        prompt: str,
        aspect_ratio: str,
        guidance_scale: float,
        num_inference_steps: int,
        max_sequence_length: int,
        output_format: str,
        num_outputs: int,
    ) -> list[str]:
        return [str(len(locals()) - 1)]
"""


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the tables under a heading, without their two head rows."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\|$\n?)+", section, re.MULTILINE)
    rows = [row.strip("|") for found in tables for row in found.splitlines()[2:]]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def bare(cell: str) -> str:
    return cell.strip("`")


def test_every_variable_has_its_row_in_the_readme() -> None:
    rows = {bare(name): bare(default) for name, default, _ in table(README, "Environment")}
    fields = {str(field.validation_alias): field for field in GatewaySettings.model_fields.values()}

    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        assert (rows[name] == "required") == field.is_required(), name
        is_number = isinstance(field.default, int) and not isinstance(field.default, bool)
        if is_number or field.default == "auto":
            assert rows[name] == str(field.default)


def test_every_variable_of_a_source_is_on_its_page() -> None:
    page = (ROOT / "docs/preparing.md").read_text(encoding="utf-8")
    own = SourceSettings.model_fields.keys() - StorageSettings.model_fields.keys()

    for name in own:
        assert f"`{SourceSettings.model_fields[name].validation_alias}`" in page


def test_every_input_has_its_row() -> None:
    page = (ROOT / "docs/requests.md").read_text(encoding="utf-8")
    rows = {bare(name): bare(default) for name, default, _ in table(page, "Inputs")}
    schema: dict[str, Any] = json.loads((ROOT / generate_schema.SCHEMA_PATH).read_text())
    inputs = schema["components"]["schemas"]["Input"]

    assert list(rows) == list(inputs["properties"])
    for name, described in inputs["properties"].items():
        assert (rows[name] == "required") == (name in inputs["required"])
        if described.get("default") is not None:
            assert json.loads(rows[name]) == described["default"]


def test_the_curl_in_the_readme_is_the_one_the_demo_sends() -> None:
    assert curl_command("http://ip:port") in README


@pytest.mark.system_program("curl", "uuidgen")
def test_the_curl_in_the_readme_fits_the_schema_as_it_stands(tmp_path: Path) -> None:
    """A shell runs it, only the address filled in; behind the tracked schema a runner counts inputs."""
    [command] = re.findall(r"^curl .*?^}'$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "predict.py").write_text(COUNTS_ITS_INPUTS)
    (tmp_path / ".cog").mkdir()
    (tmp_path / generate_schema.SCHEMA_PATH).write_bytes(
        (ROOT / generate_schema.SCHEMA_PATH).read_bytes()
    )

    with CogServer({}, cwd=tmp_path) as server:
        answer = subprocess.run(
            ["/bin/sh", "-c", command.replace("http://ip:port", server.url)],
            capture_output=True,
            text=True,
            check=True,
        )

    assert json.loads(answer.stdout)["status"] == "succeeded", answer.stdout
    assert json.loads(answer.stdout)["output"] == ["7"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "script", ["prepare_model.py", "compile_model.py", "fill_iam.py", "generate_schema.py"]
)
def test_every_option_that_a_page_gives_a_script_is_known_to_it(script: str) -> None:
    asked = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    given = set()
    for line in re.findall(rf"^python scripts/{re.escape(script)}.*$", pages, re.MULTILINE):
        given |= set(re.findall(r"--[a-z-]+", line))

    assert [option for option in given if option not in asked.stdout] == []


def test_every_command_on_the_weights_is_on_its_page() -> None:
    page = (ROOT / "docs/bucket.md").read_text(encoding="utf-8")
    asked = subprocess.run(
        [sys.executable, "-m", "weights", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = table(page, "Looking at it, and changing what is served")
    commands = re.findall(r"^    ([a-z]+) ", asked.stdout, re.MULTILINE)

    assert {bare(row[0]).split()[0] for row in rows} == set(commands)


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)))
)
def test_every_make_target_in_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_picture_is_well_formed_and_described() -> None:
    picture = ET.parse(ROOT / "docs/journeys.svg").getroot()  # noqa: S314 - our own file

    described = {child.tag.rpartition("}")[2] for child in picture}
    assert {"title", "desc"} <= described
