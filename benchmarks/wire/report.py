"""The measurements as Markdown and pictures. Everything here is computed from the JSON that the parts have left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.wire import cold, transports
from benchmarks.wire.chart import Bar, Kind, Panel, draw
from benchmarks.wire.nginx import RATE

Part = Mapping[str, Any]

WIRES = {
    "free": "Plain HTTP, as fast as it goes",
    "limited": f"Plain HTTP, {RATE / 1e6:.0f} MB/s a connection",
    "tls": "TLS",
}
HEAD = """# Getting a model out of a bucket

`make bench` writes this page (`benchmarks/weights.py`; the raw numbers are in `{data}`).

The bucket is a folder on a RAM disk behind nginx on loopback, so client and server share the cores. Each measurement
is a fresh process, timed inside it from the call to all bytes in memory (or on a RAM disk, for what writes files),
after its imports. Every round runs all ways in a new order; times are medians. Everyone is told the same endpoint,
path style, keys (nginx checks none) and certificate authority.

Before every measurement a process touches three times the model's size of fresh memory, holds it for 2.6 s and ends.
Virtual machines that report free pages to their host give freed memory back within seconds, and the first touch of it
then costs up to 2.5 s/GiB instead of 0.17: whoever ran after a large process would have looked faster. This way all
meet warm memory, and for the next 2 s nothing of it is given back.
"""
SAME_RAW = "Of raw: the speed beside the fastest raw sockets into a reused buffer; pinned ways, of as many connections."
RATIO = "Ours to it: how many times as fast this loader is, verifying, with its own choice of connections."

IN_THREADS = (
    "This loader reads in threads where nothing runs beside it, as here; a server, whose imports do, reads TLS in a "
    "process of its own, which costs a copy and that process's start."
)


def write(parts: Mapping[str, Part], output: Path, data_name: str) -> list[Path]:
    """The report and one picture a subject; returns the files written."""
    sections = [HEAD.format(data=data_name)]
    pictures: dict[str, str] = {}
    wires = {wire: parts[wire] for wire in WIRES if wire in parts}
    if wires:
        pictures["transports"] = draw(
            "A model from a bucket into memory", [_wire_panel(*pair) for pair in wires.items()]
        )
        sections.append(f"![Speed of every way]({output.stem}-transports.svg)\n")
    for wire, part in wires.items():
        sections.append(_wire_section(wire, part))
    if wires:
        lines = [f"- {name}: {reason}." for name, reason in transports.NOT_MEASURED.items()]
        sections.append("\n".join(["Not measured:", "", *lines, ""]))
    if "cold" in parts:
        pictures["cold-start"] = draw("From process start to engine ready", [_cold(parts["cold"])])
        sections.append(_cold_section(parts["cold"], f"{output.stem}-cold-start.svg"))
    if "replicas" in parts:
        sections.append(_replicas_section(parts["replicas"]))
    if "memory" in parts:
        sections.append(_memory_section(parts["memory"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(sections))
    written = [output]
    for name, picture in pictures.items():
        file = output.with_name(f"{output.stem}-{name}.svg")
        file.write_text(picture)
        written.append(file)
    return written


def _settings(part: Part) -> str:
    return (
        f"{part['date']}, {part['machine']}; {part['versions']}. "
        f"{part['bytes'] / 1e9:.2f} GB of weights, {part['rounds']} rounds.\n"
    )


def _measured(part: Part) -> list[dict[str, Any]]:
    return [
        {**one, "median": statistics.median(one["seconds"])}
        for one in part["found"]
        if one["seconds"] and not one["skipped"]
    ]


def _fastest(
    measured: list[dict[str, Any]], family: str, pinned: int | None = None
) -> dict[str, Any] | None:
    found = [
        one
        for one in measured
        if one["family"] == family and (pinned is None or one["pinned"] == pinned)
    ]
    return min(found, key=lambda one: one["median"], default=None)


def _wire_section(wire: str, part: Part) -> str:
    measured = _measured(part)
    ours = next((one for one in measured if one["name"] == transports.OURS), None)
    lines = [
        f"## {WIRES[wire]}",
        "",
        _settings(part),
        f"{SAME_RAW} {RATIO}" + (f" {IN_THREADS}" if wire == "tls" else ""),
        "",
        "| way | seconds, median | min to max | GB/s | of raw | ours to it |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in measured:
        raw = _fastest(measured, transports.RAW, one["pinned"])
        beside_raw = f"{raw['median'] / one['median']:.0%}" if raw else ""
        beside_ours = f"{one['median'] / ours['median']:.2f}" if ours else ""
        lines.append(
            f"| {one['name']} | {one['median']:.2f} | {min(one['seconds']):.2f} to {max(one['seconds']):.2f} "
            f"| {part['bytes'] / one['median'] / 1e9:.2f} | {beside_raw} | {beside_ours} |"
        )
    lines += ["", *_what_ours_did(ours), *_skipped(part)]
    return "\n".join(lines)


def _what_ours_did(ours: dict[str, Any] | None) -> list[str]:
    counters = ours["answers"][-1].get("counters") if ours else None
    if not counters:
        return []
    plain = ", ".join(
        f"{name} {value}"
        for name, value in counters.items()
        if isinstance(value, int | float | str)
    )
    return [f"This loader's own counters, last round: {plain}.", ""]


def _skipped(part: Part) -> list[str]:
    lines = [f"- {one['name']}: {one['skipped']}" for one in part["found"] if one["skipped"]]
    return ["Could not run:", "", *lines, ""] if lines else []


def _kind(name: str) -> Kind:
    if name.startswith(transports.OURS):
        return "ours"
    return "bound" if name.startswith(transports.RAW) else "peer"


def _wire_panel(wire: str, part: Part) -> Panel:
    """The best way of each family, and every pinned one, fastest first."""
    best: dict[str, dict[str, Any]] = {}
    for one in _measured(part):
        key = one["name"] if one["pinned"] else one["family"]
        if one["pinned"] and one["family"] == transports.FRESH:
            continue
        if key not in best or one["median"] < best[key]["median"]:
            best[key] = one
    bars = []
    for one in best.values():
        rate = part["bytes"] / one["median"] / 1e9
        bars.append(Bar(one["name"], rate, f"{rate:.2f} GB/s", _kind(one["name"])))
    bars.sort(key=lambda bar: -bar.value)
    size = f"{part['bytes'] / 1e9:.1f} GB"
    return Panel(f"{WIRES[wire]}, {size}: GB/s, more is better, the best of each", bars)


def _cold_medians(part: Part) -> dict[str, float]:
    return {mode: statistics.median(found) for mode, found in part["found"].items() if found}


def _cold(part: Part) -> Panel:
    bars = []
    for mode, median in _cold_medians(part).items():
        kind: Kind = {"product": "ours", "plain": "peer"}.get(mode, "bound")  # type: ignore[assignment]
        bars.append(Bar(cold.LABELS[mode], median, f"{median:.1f} s", kind))
    size = f"{part['bytes'] / 1e9:.1f} GB"
    rate = f"{cold.CONNECTIONS * RATE / 1e6:.0f} MB/s"
    return Panel(f"{size} at {rate}, on the CPU: seconds, less is better", bars)


def _cold_section(part: Part, picture: str) -> str:
    medians = _cold_medians(part)
    lines = [
        "## The whole cold start",
        "",
        _settings(part),
        (
            f"From the start of the process to an engine ready to generate, on the CPU, over {cold.CONNECTIONS} "
            f"connections of {RATE / 1e6:.0f} MB/s. A real SDXL pipeline in float32, made wide enough to be this "
            "large. The plain way downloads to a RAM disk with boto3 and as many connections, then calls stock "
            "`from_pretrained`. Warm page cache and bytecode for all. Free memory is made warm before the process "
            "starts, so what it touches seconds later may have been given back."
        ),
        "",
        f"![Seconds to ready]({picture})",
        "",
        "| what | seconds, median | min to max |",
        "| --- | ---: | ---: |",
    ]
    for mode, median in medians.items():
        times = part["found"][mode]
        lines.append(
            f"| {cold.MODES[mode]} | {median:.2f} | {min(times):.2f} to {max(times):.2f} |"
        )
    lines.append("")
    if {"product", "stream", "build"} <= medians.keys():
        longest = max(medians["stream"], medians["build"])
        lines.append(
            f"Ready in {medians['product'] / longest:.2f} times the longer of stream and build; "
            f"their sum would be {(medians['stream'] + medians['build']) / longest:.2f}."
        )
    if {"product", "plain"} <= medians.keys():
        lines.append(
            f"The plain way takes {medians['plain'] / medians['product']:.2f} times as long."
        )
    for mode, reason in part["skipped"].items():
        lines.append(f"Could not run: {cold.MODES[mode]} ({reason}).")
    return "\n".join([*lines, ""])


def _replicas_section(part: Part) -> str:
    count = part["count"]
    lines = [f"## {count} replicas on one node", "", _settings(part)]
    if part.get("skipped") or not part["found"]:
        return "\n".join([*lines, f"Could not run: {part.get('skipped')}", ""])
    lines += [
        (
            f"Each reads the same model with the node's cache on, over connections of {RATE / 1e6:.0f} MB/s: "
            f"{cold.CONNECTIONS} of them, as the cold start above, or as many as the loader chooses. Every replica "
            "copies and verifies all bytes, so that without a limit the cores are the bound. Sent: what nginx wrote in "
            "its access log, in models. The cache lies in the system's temporary folder, and what was written there is "
            "still in the page cache."
        ),
        "",
    ]
    names = {"pinned": f"{cold.CONNECTIONS} connections each", "free": "the loader's own choice"}
    for name, found in part["found"].items():
        median = {what: statistics.median(values) for what, values in found.items()}
        lines += [
            f"| {names[name]} | seconds, median | sent |",
            "| --- | ---: | ---: |",
            f"| one alone, empty cache | {median['alone']:.2f} | {median['sent alone']:.2f} |",
            f"| {count} at once, empty cache, first ready | {median['together, first ready']:.2f} | |",
            (
                f"| {count} at once, empty cache, last ready | {median['together, last ready']:.2f} "
                f"| {median['sent together']:.2f} |"
            ),
            f"| one, warm cache | {median['warm cache']:.2f} | |",
            f"| plain `readinto` of the cached files | {median['plain readinto']:.2f} | |",
            "",
            (
                f"The last of {count} is ready in {median['together, last ready'] / median['alone']:.2f} times the "
                f"time of one alone. A warm cache takes {median['warm cache'] / median['plain readinto']:.2f} times "
                "as long as plain reading."
            ),
            "",
        ]
    return "\n".join(lines)


def _memory_section(part: Part) -> str:
    lines = [
        "## Peak host memory",
        "",
        _settings(part),
        (
            "Private memory of the process and its children and what they share (counted once), looked at every 10 ms, "
            "less what there was after the imports. All tensors are held, so the model itself is in it."
        ),
        "",
        "| way | peak, MB | beyond the model, MB |",
        "| --- | ---: | ---: |",
    ]
    for one in part["found"]:
        if one["peaks"]:
            peak = statistics.median(one["peaks"])
            lines.append(
                f"| {one['name']} | {peak / 1e6:,.0f} | {(peak - part['bytes']) / 1e6:,.0f} |"
            )
    return "\n".join([*lines, "", *_skipped(part)])
