"""A cold start as a picture that needs nothing else: one bar for each phase, solid where READY waited for it.

Columns of fixed width, so that no text can run into another. All numbers are pixels.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from weights.waterfall import Phase, critical_path

WIDTH = 960
NAME_X, NAME_WIDTH = 24, 160
PLOT_X, PLOT_WIDTH = 200, 460
SECONDS_X = 736  # where the seconds end
NOTE_X, NOTE_WIDTH = 756, 180
ROW, BAR = 28, 14
# Colours as they are and no variables: what turns pictures into other formats often knows none.
STYLE = """
text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 13px; fill: #1f2328 }
.heading { font-size: 20px; font-weight: 600 } .small { font-size: 12px } .soft { fill: #59636e }
.ground { fill: #fff } .grid { stroke: #d1d9e0 }
.bar { fill: #0969da; fill-opacity: .12; stroke: #0969da } .waited { fill: #0969da }
.failed .bar { fill: #cf222e; stroke: #cf222e } .failed .waited, .bad { fill: #cf222e }
.ready { stroke: #1a7f37; stroke-width: 2 } .on-time { fill: #1a7f37; font-weight: 600 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .ground { fill: #0d1117 } .grid { stroke: #30363d }
.bar { fill: #4493f8; stroke: #4493f8 } .waited { fill: #4493f8 }
.failed .bar { fill: #f85149; stroke: #f85149 } .failed .waited, .bad { fill: #f85149 }
.ready { stroke: #3fb950 } .on-time { fill: #3fb950 }
}
"""


def draw(
    phases: Sequence[Phase],
    counters: Mapping[str, int],
    ready: float | None,
    heading: str,
    origin: str,
) -> str:
    path = critical_path(phases, ready)
    first = min([0.0, *(phase.start for phase in phases)])
    last = max([first + 0.001, ready or 0.0, *(phase.end for phase in phases)])

    def x(seconds: float) -> float:
        return PLOT_X + (seconds - first) / (last - first) * PLOT_WIDTH

    outcome = f"READY after {_seconds(ready)}" if ready is not None else "Not READY yet"
    longest = max(path, key=lambda part: part[2] - part[1], default=None)
    if longest:
        name = _fitting(longest[0].name, 400, 13)
        outcome += f"; waited longest for {name}, {_seconds(longest[2] - longest[1])}"
    spoken = "; ".join(
        f"{phase.name}: {_seconds(phase.start)} to {_seconds(phase.end)}{_spoken(phase)}"
        for phase in phases
    )
    top = 132
    bottom = top + ROW * len(phases)
    lines = [
        f"<title>{_xml(heading)}</title>",
        f"<desc>{_xml(outcome)}. {_xml(spoken)}</desc>",
        f"<style>{STYLE}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        _text(NAME_X, 36, _fitting(heading, WIDTH - 2 * NAME_X, 20), "heading"),
        _text(NAME_X, 58, _fitting(origin, WIDTH - 2 * NAME_X, 13), "soft"),
        _text(NAME_X, 80, outcome),
    ]
    for tick in _ticks(first, last):
        lines.append(f'<path class="grid" d="M{x(tick):.1f} {top - 8}V{bottom}"/>')
        lines.append(_text(x(tick), top - 16, f"{tick:g} s", "soft small", "middle"))
    for number, phase in enumerate(phases):
        waited = [(x(start), x(end)) for part, start, end in path if part is phase]
        lines += _row(phase, top + ROW * number, x(phase.start), x(phase.end), waited)
    if ready is not None:
        anchor, offset = ("end", -6) if x(ready) > PLOT_X + PLOT_WIDTH / 2 else ("start", 6)
        lines.append(f'<path class="ready" d="M{x(ready):.1f} {top - 8}V{bottom + 20}"/>')
        words = f"READY {_seconds(ready)}"
        lines.append(_text(x(ready) + offset, bottom + 18, words, "on-time", anchor))
    y = bottom + 48
    lines += _legend(y)
    for number, (name, amount) in enumerate(sorted(counters.items())):
        column, row = number % 4, number // 4
        words = _fitting(f"{amount:,} {name}", 220, 13)
        lines.append(_text(NAME_X + column * 230, y + 28 + row * 22, words, "soft"))
    height = y + 24 + (math.ceil(len(counters) / 4) * 22 if counters else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img">\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _row(
    phase: Phase, y: float, left: float, right: float, waited: list[tuple[float, float]]
) -> list[str]:
    """A phase's name, its bar, its seconds and a note, and all its details for whoever points at it."""
    failed = bool(phase.details.get("failed"))
    all_details = ", ".join(f"{key} {value}" for key, value in phase.details.items())
    hint = f"{phase.name}: {_seconds(phase.start)} to {_seconds(phase.end)}"
    note = "failed" if failed else _note(phase)
    base = y + BAR - 2
    return [
        f'<g class="failed"><title>{_xml(hint)}' if failed else f"<g><title>{_xml(hint)}",
        f"{_xml('; ' + all_details if all_details else '')}</title>",
        _text(NAME_X, base, _fitting(phase.name, NAME_WIDTH, 13)),
        # Half a pixel in, so that the outline is sharp; two wide at least, so that it is seen.
        f'<rect class="bar" x="{left:.1f}" y="{y + 0.5}" width="{max(2, right - left):.1f}" height="{BAR}" rx="2"/>',
        *(
            f'<rect class="waited" x="{a:.1f}" y="{y + 0.5}" width="{max(2, b - a):.1f}" height="{BAR}" rx="2"/>'
            for a, b in waited
        ),
        _text(SECONDS_X, base, _seconds(phase.seconds), "", "end"),
        _text(
            NOTE_X, base, _fitting(note, NOTE_WIDTH, 12), "bad small" if failed else "soft small"
        ),
        "</g>",
    ]


def _legend(y: float) -> list[str]:
    return [
        f'<rect class="waited" x="{PLOT_X}" y="{y - 11}" width="24" height="12" rx="2"/>',
        _text(PLOT_X + 32, y, "READY waited for this", "soft small"),
        f'<rect class="bar" x="{PLOT_X + 190}" y="{y - 10.5}" width="24" height="12" rx="2"/>',
        _text(PLOT_X + 222, y, "ran meanwhile", "soft small"),
    ]


def _note(phase: Phase) -> str:
    count, cpu = phase.details.get("bytes"), phase.details.get("seconds_of_cpu")
    if isinstance(count, int | float):
        if phase.seconds < 0.001:
            return _bytes(count)
        rate = count / phase.seconds
        return f"{_bytes(count)} at " + (
            f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{_bytes(rate)}/s"
        )
    return f"{_seconds(cpu)} of CPU" if isinstance(cpu, int | float) else ""


def _spoken(phase: Phase) -> str:
    note = "failed" if phase.details.get("failed") else _note(phase)
    return f", {note}" if note else ""


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers of seconds between the two, at most seven."""
    rough = (last - first) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [
        round(number * step, 9)
        for number in range(math.ceil(first / step), math.floor(last / step) + 1)
    ]


def _seconds(seconds: float) -> str:
    digits = 3 if abs(seconds) < 0.1 else 2 if abs(seconds) < 100 else 1
    return f"{seconds:,.{digits}f} s"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{_xml(words)}</text>'


def _xml(words: str) -> str:
    """The words for XML, without the characters that it, or a reader's eyes, cannot take: control and format."""
    shown = (" " if char in "\n\t" else char for char in words)
    return escape("".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in shown))


def _fitting(words: str, width: float, size: float) -> str:
    """The words, cut with an ellipsis where they could be wider than `width` in the widest usual font."""
    room = width / size
    for index, character in enumerate(words):
        wide = unicodedata.east_asian_width(character) in "WF"
        room -= 1.05 if wide or character in "mwMW@%" else 0.8 if character.isupper() else 0.62
        if room < 0:
            return words[: max(0, index - 1)].rstrip() + "…"
    return words
