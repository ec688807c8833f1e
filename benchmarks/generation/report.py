"""The measurements as Markdown and a picture. Everything here is computed from the JSON that the parts have left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation.asked import asked
from benchmarks.generation.ways import COMPILING, NOT_MEASURED, OURS, PUBLISHED, STOCK, UNCOMPILED
from benchmarks.wire.chart import Bar, Panel, draw

Part = Mapping[str, Any]

STAGES = ("wait", "prompt", "denoise", "decode")

HEAD = """# Making images

`make bench-engine` writes this page (`benchmarks/engine.py`; the raw numbers are in `{data}`).

Every way is a process of its own, prepared from the same folder: this engine as the container loads it, with all its
defaults, the others from stock `from_pretrained`. All are ready and warm before the first round, wait without
computing, and are asked one at a time; every round asks all of them the same in a new order, so that a slow minute
falls on all alike. Caches of compiled code begin empty. Figures are medians. Weights are random: time does not depend
on their values.
"""
SINGLE = (
    "One square image from the call to a Pillow image, nothing else running. Every round has a new prompt and a seed, "
    "the same for all; *again* is the same prompt with another seed right after it. *Pixels* compares every round's "
    "image with stock's: equal in every bit of every round, or the lowest PSNR. *Memory* is the most the process has "
    "had resident from its start to the end of this part, all sizes together."
)
MANY = (
    "Callers are threads that ask for an image, encode it as PNG, drop it and ask for the next, each with a prompt of "
    "its own. A stock pipeline serves one caller at a time. *Device busy* is the device's seconds, as the engine "
    "counts them, over the clock's; on a CPU encoding takes the same cores."
)
START = (
    "From the start of a process to an engine or pipeline that is ready, and to its first image, {size}x{size}; "
    "imports, reading the folder from disk (warm page cache) and compiling included. This engine also verifies every "
    "byte."
)
STARTS_OF_OURS = {
    UNCOMPILED: "with `COMPILE=off`",
    PUBLISHED: (
        "with code that `scripts/compile_model.py` has published before the first round, for this machine and this "
        "size, fetched from the demo's S3 server on loopback while the weights are read"
    ),
    COMPILING: "with `COMPILE=on` where nothing is published, so that it compiles before it is ready",
}
PUBLISHED_CODE = (
    "The command took {seconds:.0f} s to compile and publish {megabytes:.1f} MB. After every start with that code the "
    "engine was asked: the size ran compiled, and no graph was compiled there."
)
OVERHEAD = (
    "A request to Cog's own server with the restricted keypair and the demo's S3 server on loopback, one at a time: "
    "the seconds from sending it to its URL, less those of prompt, denoising and decoding that the answer states. "
    "The image is a PNG of {size}x{size} from the small model; server, S3 and caller share the cores."
)
SWITCHING = (
    "One engine with two models of {megabytes} MB each, images of {size}x{size}, one request at a time: two for one "
    "model, two for the other, and so on. The second of each two finds its model in place."
)


def write(parts: Mapping[str, Part], output: Path, data_name: str) -> list[Path]:
    """The report and its picture; returns the files written."""
    sections = [HEAD.format(data=data_name), *_asked_section(parts)]
    written = [output]
    if "single" in parts:
        sections.append(_single_section(parts["single"]))
    if "throughput" in parts:
        part = parts["throughput"]
        picture = output.with_suffix(".svg")
        panels = [_panel(part, size) for size in part["sizes"]]
        picture.write_text(draw("Images a second, by how many ask at once", panels))
        written.append(picture)
        sections.append(_throughput_section(part, picture.name))
    if "overhead" in parts:
        sections.append(_overhead_section(parts["overhead"]))
    if "start" in parts:
        sections.append(_start_section(parts["start"]))
    if "switching" in parts:
        sections.append(_switching_section(parts["switching"]))
    lines = [f"- {name}: {reason}." for name, reason in NOT_MEASURED.items()]
    sections.append("\n".join(["## Not measured", "", *lines, ""]))
    output.write_text("\n".join(sections))
    return written


def _asked_section(parts: Mapping[str, Part]) -> list[str]:
    rows = [
        f"| {line.what} | {line.asked} | {line.measured} | {'yes' if line.holds else '**no**'} |"
        for line in asked(parts)
    ]
    if not rows:
        return []
    head = ["| what | asked | measured | holds |", "| --- | --- | ---: | --- |"]
    return ["\n".join(["## What is asked of it", "", *head, *rows, ""])]


def _settings(part: Part) -> str:
    model = {"small": "The demo's small SDXL", "full": "SDXL at its full size"}[part["model"]]
    return (
        f"{part['date']}, {part['machine']}; {part['versions']}.\n"
        f"{model}, {part['dtype']}, {part['steps']} steps, rounds: {part['rounds']}. `{part['command']}`\n"
        f"What else ran on the machine when this began had a load of {part['load']:.1f}.\n"
        + (f"\n**{part['remark']}**\n" if part.get("remark") else "")
    )


def _single_section(part: Part) -> str:
    lines = ["## One image", "", _settings(part), SINGLE, ""]
    on_card = part["device"] == "cuda"
    for size, results in part["sizes"].items():
        columns = ["way", "seconds", "min to max", "times stock"]
        columns += ["on the card, ms"] if on_card else []
        columns += ["again, s", "pixels", "memory, MB"]
        columns += ["card's, MB"] if on_card else []
        lines += [f"### {size}x{size}", "", *_head(columns)]
        stock = _median(results.get(STOCK, {}).get("first", []), "seconds")
        for name, result in results.items():
            if name in part["skipped"]:
                continue
            first = [one["seconds"] for one in result["first"]]
            seconds = statistics.median(first)
            memory = part["memory"][name] or {}
            cells = [
                part["names"][name],
                f"{seconds:.3f}",
                f"{min(first):.3f} to {max(first):.3f}",
                f"{seconds / stock:.2f}" if stock else "",
            ]
            cells += [_milliseconds(result["first"], "device_seconds")] if on_card else []
            cells += [
                f"{_median(result['again'], 'seconds'):.3f}",
                _pixels(name, result["psnr"]),
                _megabytes(memory.get("host")),
            ]
            cells += [_megabytes(memory.get("card"))] if on_card else []
            lines.append(_row(cells))
        lines += ["", *_stages(part, results), *_skipped(part)]
    return "\n".join(lines)


def _stages(part: Part, results: Mapping[str, Any]) -> list[str]:
    """Where this engine's milliseconds go, and what the PNG takes after it."""
    rows: list[str] = []
    for name, result in results.items():
        if part["ways"][name] != OURS or not result["first"]:
            continue
        edges = result["first"][0]["encode"]
        if not rows:
            heads = [*STAGES, *(f"PNG of {edge}x{edge}" for edge in edges)]
            rows = _head(["milliseconds", *heads])
        for which, title in (("first", part["names"][name]), ("again", "the same prompt again")):
            cells = [_milliseconds([one["timings"] for one in result[which]], s) for s in STAGES]
            if which == "first":
                encodings = [one["encode"] for one in result["first"]]
                cells += [_milliseconds(encodings, edge) for edge in edges]
            else:
                cells += [""] * len(edges)
            rows.append(_row([title, *cells]))
    return [*rows, ""] if rows else []


def _throughput_section(part: Part, picture: str) -> str:
    lines = ["## Images a second", "", _settings(part), MANY, ""]
    lines += [f"![Images a second]({picture})", ""]
    for size, measured in part["sizes"].items():
        columns = ["way", "at once", "images a second", "min to max"]
        columns += ["times one after another", "times stock", "device busy"]
        lines += [f"### {size}x{size}, {_megapixels(size)}", "", *_head(columns)]
        stock = _median(measured.get(STOCK, {}).get("1", []), "rate")
        for name, found in measured.items():
            alone = _median(found.get("1", []), "rate")
            for concurrency, entries in sorted(found.items(), key=lambda item: int(item[0])):
                rates = [one["rate"] for one in entries]
                rate = statistics.median(rates)
                ours = part["ways"][name] == OURS
                cells = [
                    part["names"][name],
                    concurrency,
                    f"{rate:.2f}",
                    f"{min(rates):.2f} to {max(rates):.2f}",
                    f"{rate / alone:.2f}" if alone and ours else "",
                    f"{rate / stock:.2f}" if stock else "",
                    f"{_median(entries, 'busy'):.0%}" if ours else "",
                ]
                lines.append(_row(cells))
        lines += [""]
    peaks = [
        f"{part['names'][name]} {_megabytes(memory['host'])} MB"
        + (f", {_megabytes(memory['card'])} MB of the card's" if "card" in memory else "")
        for name, memory in part["memory"].items()
        if memory
    ]
    if peaks:
        lines += [f"The most memory in this part: {'; '.join(peaks)}.", ""]
    return "\n".join([*lines, *_skipped(part)])


def _panel(part: Part, size: str) -> Panel:
    bars = []
    measured = part["sizes"][size]
    for name in sorted(measured, key=lambda name: part["ways"][name] == OURS):
        ours = part["ways"][name] == OURS
        for concurrency, entries in sorted(measured[name].items(), key=lambda item: int(item[0])):
            rate = _median(entries, "rate")
            label = f"{part['names'][name]}, {concurrency} at once" if ours else part["names"][name]
            bars.append(Bar(label, rate, f"{rate:.2f}/s", "ours" if ours else "peer"))
    return Panel(f"{size}x{size}, {part['steps']} steps, {part['dtype']}", bars)


def _overhead_section(part: Part) -> str:
    lines = ["## A request beyond its generation", ""]
    if "skipped" in part:
        return "\n".join([*lines, f"Could not run: {part['skipped']}.", ""])
    found = part["found"]
    settings = (
        f"{part['date']}, {part['machine']}; {part['versions']}.\n"
        f"Requests: {part['rounds']}. `{part['command']}`\n"
        f"What else ran on the machine when this began had a load of {part['load']:.1f}.\n"
        + (f"\n**{part['remark']}**\n" if part.get("remark") else "")
    )
    lines += [settings, OVERHEAD.format(size=part["size"]), ""]
    lines += _head(["milliseconds", "median", "min to max"])
    rest = [one["overhead"] - one["encode"] - one["upload"] - one["wait"] for one in found]
    rows = {
        "the whole request": [one["seconds"] for one in found],
        "beyond prompt, denoising and decoding": [one["overhead"] for one in found],
        "of that: waiting for the device": [one["wait"] for one in found],
        "of that: encoding": [one["encode"] for one in found],
        "of that: upload and signing": [one["upload"] for one in found],
        "of that: HTTP, Cog and the rest": rest,
    }
    for name, seconds in rows.items():
        low, high = min(seconds) * 1000, max(seconds) * 1000
        lines.append(
            _row([name, f"{statistics.median(seconds) * 1000:.0f}", f"{low:.0f} to {high:.0f}"])
        )
    return "\n".join([*lines, ""])


def _start_section(part: Part) -> str:
    lines = ["## Cold start from a folder", "", _settings(part), START.format(**part), ""]
    if own := [text for name, text in STARTS_OF_OURS.items() if part["found"].get(name)]:
        lines += [f"This engine starts {'; '.join(own)}."]
        if part.get("published") and part["found"].get(PUBLISHED):
            code = part["published"]
            lines += [PUBLISHED_CODE.format(seconds=code["seconds"], megabytes=code["bytes"] / 1e6)]
        lines += [""]
    head = ["way", "ready, s", "first image, s", "min to max", "times stock", "runs compiled, s"]
    lines += _head(head)
    stock = _median(part["found"].get(STOCK, []), "image")
    for name, found in part["found"].items():
        if not found:
            continue
        images = [one["image"] for one in found]
        image = statistics.median(images)
        cells = [part["names"][name], f"{_median(found, 'ready'):.2f}", f"{image:.2f}"]
        cells += [f"{min(images):.2f} to {max(images):.2f}"]
        cells += [f"{image / stock:.2f}" if stock else ""]
        compiled = [one["compiled"] for one in found if "compiled" in one]
        lines.append(_row([*cells, f"{statistics.median(compiled):.2f}" if compiled else ""]))
    return "\n".join([*lines, "", *_skipped(part)])


def _switching_section(part: Part) -> str:
    lines = ["## Switching between two models", ""]
    if "skipped" in part:
        return "\n".join([*lines, f"Could not run: {part['skipped']}.", ""])
    lines += [_settings(part), SWITCHING.format(**part, megabytes=_megabytes(part["bytes"])), ""]
    lines += _head(["request", "seconds", "min to max"])
    for kind, name in (("same", "for the model used last"), ("other", "for the other model")):
        seconds = part["found"][kind]
        median = statistics.median(seconds)
        lines.append(_row([name, f"{median:.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}"]))
    return "\n".join([*lines, ""])


def _skipped(part: Part) -> list[str]:
    lines = [
        f"Could not run: {part['names'][name]} ({reason})."
        for name, reason in part["skipped"].items()
    ]
    return [*lines, ""] if lines else []


def _pixels(name: str, psnr: Sequence[float | None]) -> str:
    if name == STOCK or not psnr:
        return ""
    unequal = [one for one in psnr if one is not None]
    return f"{min(unequal):.1f} dB" if unequal else "equal"


def _median(entries: Sequence[Mapping[str, Any]], what: str) -> float:
    """0 of none."""
    return statistics.median([one[what] for one in entries]) if entries else 0.0


def _milliseconds(entries: Sequence[Mapping[str, Any]], what: str) -> str:
    return f"{_median(entries, what) * 1000:.1f}"


def _megabytes(count: int | None) -> str:
    return f"{count / 1e6:,.0f}" if count else ""


def _megapixels(size: str) -> str:
    return f"{int(size) ** 2 / 1e6:.3f} megapixels"


def _head(columns: Sequence[str]) -> list[str]:
    return [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
