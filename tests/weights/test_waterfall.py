"""A cold start's record tells where the time went, whatever names it is given, and never stands in the way."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from weights.waterfall import ColdStart, process_start

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("&\'")</script>]]>\x00\x1b[31m\ud800\u202e\n'


def streamed(**names: str) -> ColdStart:
    """Bytes flow while libraries are imported; the device gets tensors as they come."""
    start = ColdStart(0.0, **names)
    start.add("imports", 1.0, 6.0, seconds_of_cpu=5.5)
    start.add("manifest", 0.0, 1.0)
    start.add("bytes", 1.0, 9.0, after=["manifest"], bytes=6_938_000_000)
    start.add("build", 6.0, 7.0, after=["imports"])
    start.add("device", 7.0, 9.5, after=["build", "bytes"])
    start.add("warm-up", 9.5, 11.0)
    return start


def hostile() -> ColdStart:
    """Long names, tiny phases, huge numbers, and characters that mean something elsewhere."""
    start = ColdStart(0.0, model=HOSTILE + "M" * 300, version="W" * 200)
    start.add(HOSTILE, 0.0, 0.0, after=[HOSTILE], bytes=10**15, note=HOSTILE)
    start.add("W" * 200, 0.0, 1e-6, bytes=10**15)
    start.add("検証" * 50, 50_000.0, 100_000.0, bytes=3, seconds_of_cpu=float("nan"))
    start.add("late", 99_999.9999, 100_000.0, failed=True)
    start.count("m" * 200, 10**18)
    start.count(HOSTILE)
    return start


def drawn(start: ColdStart) -> ET.Element:
    return ET.fromstring(start.as_svg())  # noqa: S314 - written by the code under test


def shown(start: ColdStart) -> list[str]:
    return ["".join(text.itertext()) for text in drawn(start).iter(f"{SVG}text")]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def boxes(svg: ET.Element) -> Iterator[tuple[float, float, float, float, str]]:
    """Left, top, right, bottom of every text, about as wide as the widest usual font makes it."""
    for text in svg.iter(f"{SVG}text"):
        words = "".join(text.itertext())
        kind = text.get("class", "")
        size = 20 if "heading" in kind else 12 if "small" in kind else 13
        width = size * sum(1.0 if c in "MWmw@" or ord(c) > 0x2E80 else 0.6 for c in words)
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        left = x - width * {"end": 1.0, "middle": 0.5}.get(text.get("text-anchor", ""), 0.0)
        yield left, y - size * 0.8, left + width, y + size * 0.2, words


def test_the_record_survives_json() -> None:
    start = streamed(model="ByteDance/SDXL-Lightning", version="ab" * 16)
    start.count("requests", 431)
    start.count("requests")
    start.ready()

    record = json.loads(json.dumps(start.as_dict(), allow_nan=False))

    assert record == start.as_dict()
    assert record["model"] == "ByteDance/SDXL-Lightning"
    assert record["version"] == "ab" * 16
    assert record["counters"] == {"requests": 432}
    assert record["ready_after_s"] > 0
    assert [phase["name"] for phase in record["phases"]][:3] == ["manifest", "imports", "bytes"]
    assert record["phases"][2] == {
        "name": "bytes",
        "start_s": 1.0,
        "end_s": 9.0,
        "after": ["manifest"],
        "bytes": 6_938_000_000,
    }


def test_the_critical_path_goes_through_what_was_waited_for() -> None:
    assert streamed().as_dict()["critical_path"] == [
        {"name": "manifest", "start_s": 0.0, "end_s": 1.0},
        {"name": "bytes", "start_s": 1.0, "end_s": 9.0},
        {"name": "device", "start_s": 9.0, "end_s": 9.5},
        {"name": "warm-up", "start_s": 9.5, "end_s": 11.0},
    ]


def test_what_goes_on_after_ready_was_not_waited_for() -> None:
    start = ColdStart()
    with start.phase("warm-up"):
        time.sleep(0.002)  # times are kept in microseconds, and what took none was not waited for
    start.ready()
    first = start.as_dict()["ready_after_s"]
    with start.phase("filling the cache"):
        start.ready()

    record = start.as_dict()

    assert [phase["name"] for phase in record["critical_path"]] == ["warm-up"]
    assert len(record["phases"]) == 2
    assert record["ready_after_s"] == first


@pytest.mark.parametrize("after", [["a"], ["b"], ["a", "b"], ["nothing"]])
def test_phases_that_wait_for_each_other_do_not_hang_the_record(after: list[str]) -> None:
    start = ColdStart(0.0)
    start.add("a", 0.0, 1.0, after=after)
    start.add("b", 0.5, 1.0, after=after)

    path = start.as_dict()["critical_path"]

    assert all(earlier["end_s"] <= later["start_s"] for earlier, later in itertools.pairwise(path))


def test_a_phase_that_raises_is_recorded_as_failed() -> None:
    start = ColdStart(0.0)

    def build() -> None:
        with start.phase("build", after=["imports"]) as details:
            details.update(name="mine", start_s=-1, layers=3)
            raise KeyError

    with pytest.raises(KeyError):
        build()

    [phase] = start.as_dict()["phases"]
    assert phase["name"] == "build"
    assert phase["start_s"] > 0
    assert (phase["failed"], phase["layers"]) == (True, 3)
    assert "failed" in shown(start)


def test_details_become_plain_values() -> None:
    start = ColdStart(0.0)
    start.add("bytes", 0.0, 1.0, path=Path("unet"), rate=float("inf"), cached=False)

    [phase] = start.as_dict()["phases"]

    assert (phase["path"], phase["rate"], phase["cached"]) == ("unet", None, False)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_the_clock_starts_with_the_process() -> None:
    began = process_start()

    # This process runs its tests since at least the start of this test, and does not run since boot.
    assert 0 < time.monotonic() - began < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert process_start() == pytest.approx(began, abs=0.05)


def test_the_picture_says_what_the_record_says() -> None:
    start = streamed(model="ByteDance/SDXL-Lightning")
    start.count("retries", 2)

    words = shown(start)

    assert "Cold start of ByteDance/SDXL-Lightning" in words
    assert {"imports", "manifest", "bytes", "build", "device", "warm-up"} <= set(words)
    assert {"8.00 s", "6.94 GB at 0.87 GB/s", "5.50 s of CPU", "2 retries"} <= set(words)
    assert "Not READY yet; waited longest for bytes, 8.00 s" in words


@pytest.mark.parametrize("make", [ColdStart, streamed, hostile])
def test_the_picture_stands_alone(make: type[ColdStart]) -> None:
    start = make()
    svg, root = start.as_svg(), drawn(start)

    assert root.attrib["role"] == "img"
    assert root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    assert svg.count("http") == 1  # the namespace: nothing is fetched
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "path", "text", "g")
    }
    assert "prefers-color-scheme: dark" in svg


def test_hostile_names_are_words_and_nothing_else() -> None:
    start = hostile()

    svg = start.as_svg()

    assert "<script" not in svg
    assert not set(svg) & set("\x00\x1b\ud800\u202e")
    assert any(text.startswith("<script>alert(") for text in shown(start))
    assert json.loads(json.dumps(start.as_dict()))["phases"][0]["name"] == HOSTILE


@pytest.mark.parametrize("make", [ColdStart, streamed, hostile])
def test_no_text_is_clipped_or_runs_into_another(make: type[ColdStart]) -> None:
    start = make()
    start.ready()
    svg = drawn(start)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())

    found = list(boxes(svg))

    for left, top, right, bottom, words in found:
        assert left >= 0, words
        assert top >= 0, words
        assert right <= width, words
        assert bottom <= height, words
    for index, (left, top, right, bottom, words) in enumerate(found):
        for other in found[index + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (words, other[4])


def test_every_bar_can_be_seen_and_lies_in_the_picture() -> None:
    svg = drawn(hostile())
    width = float(svg.attrib["width"])

    bars = [bar for bar in svg.iter(f"{SVG}rect") if bar.get("class") != "ground"]

    assert len(bars) >= 4
    assert all(float(bar.attrib["width"]) >= 2 for bar in bars)
    assert all(0 <= float(bar.attrib["x"]) <= width - float(bar.attrib["width"]) for bar in bars)


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    start = streamed()
    folder = tmp_path / "new" / "folder"
    start.write(folder)
    start.add("later", 11.0, 12.0)

    record, picture = start.write(folder)

    assert names_in(folder) == ["cold-start.json", "cold-start.svg"]
    assert json.loads(record.read_text("utf-8")) == start.as_dict()
    assert picture.read_text("utf-8") == start.as_svg()


def test_a_folder_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    with caplog.at_level(logging.WARNING):
        streamed().write(blocked)

    [message] = caplog.messages
    assert str(blocked) in message
    assert "Serving goes on" in message


def test_a_file_that_cannot_be_replaced_leaves_no_stray_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cold-start.json").mkdir()

    streamed().write(tmp_path)

    assert len(caplog.messages) == 1
    assert names_in(tmp_path) == ["cold-start.json"]


def test_times_that_are_none_do_not_stop_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = ColdStart(0.0)
    start.add("broken", float("nan"), float("inf"))

    start.write(tmp_path)

    assert len(caplog.messages) == 1


def test_many_threads_record_at_once() -> None:
    start = ColdStart()

    def work(number: int) -> None:
        for _ in range(50):
            with start.phase(f"thread {number}"):
                start.count("steps")
        start.as_dict()["phases"].clear()  # what is given out is a copy

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    record = start.as_dict()
    assert len(record["phases"]) == 400
    assert record["counters"] == {"steps": 400}


def written_in(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "cold-start.json").read_text("utf-8"))
    return record


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_phase_that_goes_on_has_no_end_yet() -> None:
    start = ColdStart()
    read = {"bytes": 3, "total_bytes": 10}
    start.begin("bytes", after=["manifest"], so_far=lambda: read)
    with start.phase("imports"):
        first = {phase["name"]: phase for phase in start.as_dict()["phases"]}
    read["bytes"] = 4
    second = {phase["name"]: phase for phase in start.as_dict()["phases"]}

    assert first["bytes"]["in_progress"] is True
    assert first["imports"]["in_progress"] is True
    assert (first["bytes"]["bytes"], second["bytes"]["bytes"]) == (3, 4)
    assert second["bytes"]["end_s"] > first["bytes"]["end_s"] >= first["bytes"]["start_s"]
    assert second["bytes"]["after"] == ["manifest"]
    assert "in_progress" not in second["imports"]
    # Nobody can have waited for the whole of what is not over.
    assert [part["name"] for part in start.as_dict()["critical_path"]] == ["imports"]


def test_a_phase_that_is_recorded_goes_on_no_more() -> None:
    start = ColdStart(0.0)
    start.begin("bytes", 1.0)
    start.add("bytes", 1.0, 9.0, bytes=5)

    [phase] = start.as_dict()["phases"]

    assert phase == {"name": "bytes", "start_s": 1.0, "end_s": 9.0, "after": [], "bytes": 5}


def test_a_phase_whose_end_is_known_before_it_is_recorded_ends_there() -> None:
    start = ColdStart(0.0)
    end: list[float] = []
    start.begin("bytes", 1.0, ended=lambda: end[0] if end else None)
    goes_on = start.as_dict()["phases"][0]
    end.append(4.0)
    over = start.as_dict()["phases"][0]

    assert goes_on["in_progress"] is True
    assert over == {"name": "bytes", "start_s": 1.0, "end_s": 4.0, "after": []}


def test_what_was_given_up_is_recorded_as_failed() -> None:
    start = ColdStart()
    start.begin("bytes", so_far=lambda: 1 / 0)  # type: ignore[arg-type, return-value]

    start.give_up()

    [phase] = start.as_dict()["phases"]
    assert phase["failed"] is True
    assert "in_progress" not in phase


def test_the_record_is_written_while_the_start_goes_on(tmp_path: Path) -> None:
    start = ColdStart()
    folder = tmp_path / "new" / "folder"
    with start.written_to(folder):
        until((folder / "cold-start.json").exists)
        with start.phase("build"):
            until(lambda: any(phase.get("in_progress") for phase in written_in(folder)["phases"]))
        assert written_in(folder)["ready_after_s"] is None
        start.ready()

    assert written_in(folder) == start.as_dict()
    assert written_in(folder)["ready_after_s"] > 0
    assert names_in(folder) == ["cold-start.json", "cold-start.svg"]


def test_the_record_of_a_start_that_fails_is_written(tmp_path: Path) -> None:
    start = ColdStart()

    def fails() -> None:
        with start.written_to(tmp_path), start.phase("build"):
            raise KeyError

    with pytest.raises(KeyError):
        fails()

    assert [phase["failed"] for phase in written_in(tmp_path)["phases"]] == [True]


def test_writing_while_the_start_goes_on_never_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = ColdStart()
    asked: list[None] = []

    def breaks() -> dict[str, int]:
        asked.append(None)
        raise ZeroDivisionError

    with start.written_to(tmp_path):
        start.begin("bytes", so_far=breaks)
        until(lambda: bool(asked))
        start.add("bytes", 0.0, 1.0)

    assert len(written_in(tmp_path)["phases"]) == 1

    blocked = tmp_path / "file"
    blocked.write_text("")
    with start.written_to(blocked):
        pass

    assert len(caplog.messages) == 1  # said once, at the end
