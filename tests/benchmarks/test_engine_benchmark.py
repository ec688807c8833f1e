"""The benchmark of the engine at its smallest: it runs, it compares pixels, and its page has a row for everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.generation import start
from benchmarks.generation.asked import asked
from benchmarks.generation.command import contest_of
from benchmarks.generation.model import Job, full_dimensions, write_model
from benchmarks.generation.rounds import Contest
from benchmarks.generation.ways import COMPILING, PUBLISHED, UNCOMPILED, WAYS, ways_for
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


def run(output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/engine.py", "--output", str(output), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


START = (
    *("--parts", "start", "--ways", "ours", "--model", "small", "--size", "64"),
    *("--steps", "1", "--rounds", "1", "--dtype", "float32"),
)


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


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything prepared at once, then measured, with this engine's own starts; its progress is in progress.txt."""
    output = tmp_path_factory.mktemp("side-by-side") / "engine.md"
    finished = run(
        output,
        *("--side-by-side", "--parts", "start,switching,throughput,single"),
        *("--ways", "eager,torchao", "--ours", "MODEL_READER=thread", "--start-ways", "ours"),
        *("--model", "small", "--size", "64", "--steps", "1", "--dtype", "float32"),
        *("--rounds", "2", "--throughput-rounds", "1", "--start-rounds", "1"),
        *("--concurrency", "1,2"),
    )
    assert finished.returncode == 0, finished.stderr
    output.with_name("progress.txt").write_text(finished.stderr)
    return output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.system_program("g++")
def test_side_by_side_all_is_prepared_before_anything_is_measured(side_by_side: Path) -> None:
    progress = side_by_side.with_name("progress.txt").read_text()

    before, after = progress.split("all that can be had is ready", 1)
    for prepared in (
        "eager: ready and warm after",
        "MODEL_READER=thread: ready and warm after",
        "torchao: skipped",
        "[switching] two models after",
        "published code: there after",
    ):
        assert prepared in before
    assert "[64x64" not in before
    assert "[start" not in before
    assert "[start" in after
    parts = json.loads(side_by_side.with_suffix(".json").read_text())
    assert [*parts] == ["single", "throughput", "switching", "start"]
    assert [part["rounds"] for part in parts.values()] == [2, 1, 2, 1]
    assert all(parts["switching"]["found"].values())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.system_program("g++")
def test_a_start_with_published_code_stands_between_one_without_and_one_that_compiles(
    side_by_side: Path,
) -> None:
    table = rows(side_by_side.read_text(), "Cold start from a folder")
    assert [row[0] for row in table if row[0].startswith("this engine")] == [
        "this engine, COMPILE=off",
        "this engine, published code",
        "this engine, COMPILE=on, nothing published",
    ]
    part = json.loads(side_by_side.with_suffix(".json").read_text())["start"]
    assert [*part["found"]] == [UNCOMPILED, PUBLISHED, COMPILING]
    assert all(part["found"].values())
    assert not part["skipped"]
    assert part["published"]["bytes"] > 0
    assert part["published"]["sizes"] == ["64x64"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_interrupted_while_all_are_being_prepared_it_leaves_no_process_behind(
    tmp_path: Path,
) -> None:
    mark = f"TMPDIR={tmp_path}"  # which every process of it inherits
    command = [sys.executable, "benchmarks/engine.py", "--output", str(tmp_path / "engine.md")]
    parts = ["--parts", "single,switching,start", "--side-by-side", "--model", "small"]
    ways = ["--ways", "ours,eager", "--size", "64"]
    with subprocess.Popen(
        [*command, *parts, *ways],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "compiling and publishing" in line:
                break
        running = marked(mark)
        process.terminate()
        process.stderr.read()

    assert len(running) > 4  # it, the S3 server, and three that make images
    assert process.returncode == 143
    assert not marked(mark)
    assert not [left for left in tmp_path.iterdir() if left.name.startswith("bench-")]


def marked(mark: str) -> list[Path]:
    return [process for process in Path("/proc").iterdir() if mark in environment_of(process)]


def environment_of(process: Path) -> list[str]:
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # not a process, not ours, or gone
        return []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.system_program("g++")
def test_one_after_another_code_is_published_before_the_first_start_with_it(tmp_path: Path) -> None:
    output = tmp_path / "engine.md"

    finished = run(output, *START, "--start-ways", "published")

    assert finished.returncode == 0, finished.stderr
    assert "Could not run" not in output.read_text()
    steps = ("published code: there after", "[start, not counted]", "[start, round 1 of 1]")
    places = [finished.stderr.index(step) for step in steps]
    assert places == sorted(places)
    part = json.loads(output.with_suffix(".json").read_text())["start"]
    assert [*part["found"]] == [PUBLISHED]
    assert len(part["found"][PUBLISHED]) == 1


@pytest.mark.slow
def test_without_a_compiler_the_starts_with_compiled_code_are_left_out_and_say_why(
    tmp_path: Path,
) -> None:
    output = tmp_path / "engine.md"

    finished = run(output, *START, PATH=str(tmp_path))

    assert finished.returncode == 0, finished.stderr
    table = rows(output.read_text(), "Cold start from a folder")
    assert [row[0] for row in table[2:]] == ["this engine, COMPILE=off"]
    published, compiling = (
        line for line in output.read_text().splitlines() if line.startswith("Could not run")
    )
    assert (
        "published code (nothing was published: compile_model: 64x64 did not compile" in published
    )
    assert "COMPILE=on, nothing published (0 graphs were taken from artifacts" in compiling


def test_a_start_that_did_not_use_what_was_published_is_not_measured(tmp_path: Path) -> None:
    job = Job("small", str(tmp_path / "model"), "cpu", "float32", steps=1, native_size=64)
    model_bytes = write_model(job)
    # Which fetches nothing on a CPU.
    contest = Contest({PUBLISHED: replace(job, settings={"COMPILE": "auto"})}, {PUBLISHED: "ours"})
    skipped: dict[str, str] = {}

    found = start.measure(contest, 64, 1, model_bytes, skipped)

    assert found == {PUBLISHED: []}
    assert skipped[PUBLISHED].startswith(
        "0 graphs were taken from artifacts and 0 compiled, and 64x64 is not compiled"
    )


@pytest.mark.parametrize(
    ("name", "sizes", "made", "found", "holds"),
    [
        (PUBLISHED, [[64, 64]], 0, 2, True),
        (PUBLISHED, [[64, 64]], 1, 1, False),
        (PUBLISHED, [[64, 64]], 2, 0, False),
        (PUBLISHED, [[256, 256]], 0, 2, False),
        (COMPILING, [[64, 64]], 2, 0, True),
        (COMPILING, [[64, 64]], 1, 1, True),
        (COMPILING, [[64, 64]], 0, 2, False),
        (COMPILING, [], 2, 0, False),
    ],
)
def test_a_start_is_what_it_is_called(
    name: str, sizes: list[list[int]], made: int, found: int, holds: bool
) -> None:
    assert start.runs_compiled(name, 64, {"sizes": sizes, "made": made, "found": found}) is holds


JOB = Job("small", "/nowhere", "cpu", "float32", steps=4, native_size=64)


def test_this_engine_starts_in_three_ways_beside_the_others_and_its_variants() -> None:
    starts = start.starts_of(contest_of(JOB, ["ours", "eager"], ["FLOAT8=on"]), JOB, None)

    assert [*starts.jobs] == [UNCOMPILED, PUBLISHED, COMPILING, "eager", "FLOAT8=on"]
    assert starts.jobs[UNCOMPILED].settings == {"COMPILE": "off"}
    assert starts.jobs[COMPILING].settings == {"COMPILE": "on"}
    assert starts.jobs["FLOAT8=on"].settings == {"FLOAT8": "on"}
    assert starts.jobs["eager"] == JOB
    assert [*starts.ways.values()].count("ours") == 4


def test_a_variant_brings_this_engine_s_own_starts_and_is_not_started_twice() -> None:
    starts = start.starts_of(contest_of(JOB, ["eager"], ["COMPILE=on", "COMPILE=off"]), JOB, None)

    assert [*starts.jobs] == [UNCOMPILED, PUBLISHED, COMPILING, "eager"]
    assert starts.jobs[UNCOMPILED].settings == {"COMPILE": "off"}


def test_where_this_engine_is_not_in_the_contest_only_the_others_start() -> None:
    assert [*start.starts_of(contest_of(JOB, ["eager"], []), JOB, None).jobs] == ["eager"]


@pytest.mark.parametrize(
    ("names", "starting"),
    [
        (["uncompiled", "published"], [UNCOMPILED, PUBLISHED]),
        (["eager", "published"], [PUBLISHED, "eager"]),
        (["ours"], [UNCOMPILED, PUBLISHED, COMPILING]),
        (["compile"], ["compile"]),
    ],
)
def test_who_starts_can_be_chosen_apart_from_the_contest(
    names: list[str], starting: list[str]
) -> None:
    starts = start.starts_of(contest_of(JOB, ["eager"], ["FLOAT8=on"]), JOB, names)

    assert [*starts.jobs] == [*starts.ways] == starting


def test_a_job_s_secrets_stay_off_the_command_line() -> None:
    keys = {"AWS_SECRET_ACCESS_KEY": "not-for-everybody"}
    job = Job("small", "/nowhere", "cpu", "float32", steps=4, native_size=64, secrets=keys)

    assert "not-for-everybody" not in job.dump() + repr(job)
    assert Job.load(job.dump()) == replace(job, secrets={})


def test_a_start_that_nobody_knows_is_refused_with_those_there_are(tmp_path: Path) -> None:
    refused = run(tmp_path / "engine.md", "--start-ways", "published,lukewarm")

    assert refused.returncode == 2
    assert "'lukewarm' is none of" in refused.stderr
    assert "uncompiled, published, compiling" in refused.stderr


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

    lines = [line for line in asked(parts) if "on the card" in line.what and "fp8" in line.what]

    assert [(line.asked, line.holds) for line in lines] == [("at most 75 ms on an H200", False)]


def test_on_a_card_every_setting_of_this_engine_is_held_against_what_is_asked() -> None:
    parts = measured(0.10, 0.26, 40.0, "cuda")
    single = parts["single"]
    at_1024 = single["sizes"]["1024"]
    at_1024["COMPILE=on"] = at_1024.pop("ours")
    at_1024["FLOAT8=on"] = measured(0.07, 0.26, 20.0)["single"]["sizes"]["1024"]["ours"]
    at_1024["compile"] = measured(0.09, 0.26, None)["single"]["sizes"]["1024"]["ours"]
    single["ways"] = {name: name for name in at_1024} | dict.fromkeys(
        ["COMPILE=on", "FLOAT8=on"], "ours"
    )
    single["names"] = {name: f"<{name}>" for name in at_1024}

    lines = [*asked(parts)]

    of_one, of_other = (
        [line for line in lines if f"<{name}>" in line.what] for name in ("COMPILE=on", "FLOAT8=on")
    )
    assert [line.holds for line in of_one] == [True, False, True, True]
    # No decibels are asked of float8.
    assert [line.holds for line in of_other] == [True, True, True]


def test_on_a_card_every_setting_of_this_engine_may_idle_as_little() -> None:
    def busy(share: float) -> dict[str, Any]:
        return {"8": [{"rate": 1.0, "busy": share}]}

    found = {"ours": busy(0.95), "COMPILE=on": busy(0.8), "eager": {"1": [{"rate": 1.0}]}}
    ways = {"ours": "ours", "COMPILE=on": "ours", "eager": "eager"}
    part = {"device": "cuda", "sizes": {"1024": found}, "names": ways, "ways": ways}

    assert [line.holds for line in asked({"throughput": part})] == [True, False]


def started(published: float, device: str) -> dict[str, Any]:
    found = {PUBLISHED: [{"image": published}], UNCOMPILED: [{"image": 20.0}]}
    return {"start": {"device": device, "found": found}}


@pytest.mark.parametrize(("published", "holds"), [(22.9, True), (19.0, True), (23.1, False)])
def test_published_code_may_lengthen_a_cold_start_on_a_card_by_three_seconds(
    published: float, holds: bool
) -> None:
    (line,) = asked(started(published, "cuda"))

    assert line.holds is holds
    assert line.measured == f"{published - 20:+.2f} s"


def test_nothing_is_asked_of_a_start_on_a_cpu_or_of_one_that_was_left_out() -> None:
    left_out = started(22.9, "cuda")
    left_out["start"]["found"][PUBLISHED] = []

    assert [*asked(started(22.9, "cpu")), *asked(left_out)] == []
