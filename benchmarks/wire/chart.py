"""Horizontal bars in an SVG of its own, without a library: panels of labelled values, readable on any background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Kind = Literal["ours", "bound", "peer"]

COLOURS: dict[Kind, str] = {"ours": "#d9480f", "bound": "#868e96", "peer": "#4263eb"}
WIDTH = 900
LABELS = 330  # pixels of the column of labels, or as many as the longest takes
LETTER = 8.2  # pixels; bold and in a wide font
VALUES = 130  # pixels kept free right of the longest bar
ROW, BAR, TITLE, MARGIN = 26, 17, 46, 20


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    kind: Kind


@dataclass(frozen=True)
class Panel:
    title: str
    bars: Sequence[Bar]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Every panel has a scale of its own, from zero."""
    body: list[str] = []
    top = MARGIN + 24
    longest = max((len(bar.label) for panel in panels for bar in panel.bars), default=0)
    left = MARGIN + max(LABELS, round(LETTER * longest))
    for panel in panels:
        body += _panel(panel, top, left)
        top += TITLE + ROW * len(panel.bars)
    height = top + MARGIN
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img">'
            ),
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            (
                f'<text x="{MARGIN}" y="{MARGIN + 8}" font-size="18" font-weight="bold" fill="#212529">'
                f"{escape(title)}</text>"
            ),
            *body,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, top: int, left: int) -> list[str]:
    most = max((bar.value for bar in panel.bars), default=0) or 1.0
    lines = [
        f'<text x="{MARGIN}" y="{top + 26}" font-size="14" fill="#495057">{escape(panel.title)}</text>',
        (
            f'<line x1="{left}" y1="{top + TITLE - 8}" x2="{left}" '
            f'y2="{top + TITLE + ROW * len(panel.bars) - 4}" stroke="#ced4da"/>'
        ),
    ]
    for number, bar in enumerate(panel.bars):
        y = top + TITLE + ROW * number
        length = (WIDTH - left - VALUES - MARGIN) * bar.value / most
        weight = ' font-weight="bold"' if bar.kind == "ours" else ""
        lines += [
            (
                f'<text x="{left - 8}" y="{y + 9}" font-size="13" text-anchor="end" fill="#212529"{weight}>'
                f"{escape(bar.label)}</text>"
            ),
            f'<rect x="{left}" y="{y - 4}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[bar.kind]}"/>',
            (
                f'<text x="{left + length + 6:.1f}" y="{y + 9}" font-size="13" fill="#212529"{weight}>'
                f"{escape(bar.text)}</text>"
            ),
        ]
    return lines
