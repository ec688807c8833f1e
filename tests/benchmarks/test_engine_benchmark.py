"""The benchmark of the engine at its smallest: it runs, it compares pixels, and its page has a row for everything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.generation.asked import asked
from benchmarks.generation.command import contest_of
from benchmarks.generation.model import Job, full_dimensions
from benchmarks.generation.ways import WAYS, ways_for
from demo import small_sdxl

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCY = ("1", "2")


def rows(page: str, heading: str) -> list[list[str]]:
    """Of every table below a heading of the second level, heads included."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(table: Sequence[Sequence[str]], name: str) -> list[Sequence[str]]:
    return [row for row in table if row[0] == name]


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/engine.py", "--output", str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ways that are always here, and one that needs a card."""
    output = tmp_path_factory.mktemp("results") / "engine.md"
    finished = run(
        output,
        *("--parts", "single,throughput,switching", "--ways", "ours,eager,torchao"),
        *("--model", "small", "--size", "64", "--steps", "1", "--rounds", "1"),
        *("--dtype", "float32", "--concurrency", ",".join(CONCURRENCY)),
    )
    assert finished.returncode == 0, finished.stderr
    return output


@pytest.mark.slow
def test_every_way_has_its_row_and_on_a_cpu_our_pixels_are_stocks(page: Path) -> None:
    table = rows(page.read_text(), "One image")
    head = table[0]

    assert head[:4] == ["way", "seconds", "min to max", "times stock"]
    for name in ("this engine", "stock diffusers"):
        assert float(named(table, name)[0][1]) > 0
    assert named(table, "this engine")[0][head.index("pixels")] == "equal"
    assert "torchao" in page.read_text().split("Could not run:", 1)[1]


@pytest.mark.slow
def test_stages_and_encoding_have_their_columns(page: Path) -> None:
    table = rows(page.read_text(), "One image")
    stages = next(row for row in table if row[0] == "milliseconds")

    assert stages[1:] == ["wait", "prompt", "denoise", "decode", "PNG of 64x64", "PNG of 1024x1024"]
    assert all(float(cell) >= 0 for cell in named(table, "this engine")[1][1:])
    assert named(table, "the same prompt again")


@pytest.mark.slow
def test_every_concurrency_has_its_row_and_its_bar(page: Path) -> None:
    table = rows(page.read_text(), "Images a second")

    assert [row[1] for row in named(table, "this engine")] == [*CONCURRENCY]
    assert [row[1] for row in named(table, "stock diffusers")] == ["1"]
    chart = page.with_suffix(".svg").read_text()
    for concurrency in CONCURRENCY:
        assert f"this engine, {concurrency} at once" in chart


@pytest.mark.slow
def test_switching_is_measured_beside_staying(page: Path) -> None:
    table = rows(page.read_text(), "Switching between two models")

    for request in ("for the model used last", "for the other model"):
        assert float(named(table, request)[0][1]) > 0


def test_a_setting_that_this_product_does_not_have_is_refused(tmp_path: Path) -> None:
    refused = run(tmp_path / "engine.md", "--ours", "NO_SUCH_SETTING=1")

    assert refused.returncode == 2
    assert "NO_SUCH_SETTING" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_variant_is_this_engine_with_its_settings_beside_the_plain_one() -> None:
    job = Job("small", "/nowhere", "cpu", "float32", steps=4, native_size=64)

    contest = contest_of(job, ["ours", "eager"], ["DTYPE=float16,MODEL_READER=thread"])

    assert contest.jobs["ours"] == contest.jobs["eager"] == job
    (variant,) = contest.jobs.keys() - {"ours", "eager"}
    assert contest.ways[variant] == "ours"
    assert contest.jobs[variant].settings == {"DTYPE": "float16", "MODEL_READER": "thread"}


def test_a_device_gets_the_ways_that_suit_it() -> None:
    on_cpu, on_card = ways_for("cpu", None), ways_for("cuda", None)

    assert {"ours", "eager", "compile"} <= set(on_cpu) & set(on_card)
    assert set(on_cpu) ^ set(on_card) == {name for name, way in WAYS.items() if way.only}


def test_the_full_model_has_as_many_parameters_as_sdxl_in_each_part() -> None:
    drawn = {}
    with torch.device("meta"):
        for part, tensors in small_sdxl._components(
            full_dimensions("bfloat16"), 0, lambda _, shape: torch.empty(tuple(shape))
        ):
            drawn[part.folder] = sum(tensor.numel() for tensor in tensors.values())

    assert drawn == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    }


def measured(ours: float, stock: float, psnr: float | None, device: str = "cpu") -> dict[str, Any]:
    def results(seconds: float, found: Sequence[float | None]) -> dict[str, Any]:
        return {"first": [{"seconds": seconds, "device_seconds": seconds}], "psnr": found}

    both = {"ours": results(ours, [psnr]), "eager": results(stock, [None])}
    names = {name: name for name in both}
    single = {"device": device, "sizes": {"1024": both}, "names": names, "ways": names}
    return {"single": single}


@pytest.mark.parametrize(
    ("parts", "holds"),
    [
        (measured(0.9, 1.0, None), [True, True]),
        (measured(1.1, 1.0, 70.0), [False, False]),
        # On a card: times stock, decibels, milliseconds.
        (measured(0.10, 0.26, 40.0, "cuda"), [True, True, True]),
        (measured(0.12, 0.26, 30.0, "cuda"), [False, False, False]),
    ],
)
def test_what_is_asked_is_held_against_what_was_measured(
    parts: dict[str, Any], holds: list[bool]
) -> None:
    assert [line.holds for line in asked(parts)] == holds


def test_settings_in_float8_have_a_limit_of_their_own() -> None:
    parts = measured(0.10, 0.26, 40.0, "cuda")
    single = parts["single"]
    single["sizes"]["1024"]["LINEAR=fp8"] = single["sizes"]["1024"]["ours"]
    single["names"] |= {"LINEAR=fp8": "this engine, LINEAR=fp8"}
    single["ways"] = {"ours": "ours", "eager": "eager", "LINEAR=fp8": "ours"}

    lines = [line for line in asked(parts) if "fp8" in line.what]

    assert [(line.asked, line.holds) for line in lines] == [("at most 75 ms on an H200", False)]
