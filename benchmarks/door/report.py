"""The page of benchmarks/gateway.py, from what it measured."""

from __future__ import annotations

import re
from math import comb
from statistics import median
from typing import Any

from benchmarks.wire.chart import Bar, Panel, draw

BARE = "Cog's server bare, PUT"
PUT = "the gateway, PUT with the caller's id"
POST = "the gateway, POST"
NAMES = {"card": "A card that is a clock", "small": "The small SDXL"}
MOST_MS = 5.0
MOST_LOSS = 0.02

HEAD = """# What the gateway costs

Written by `.venv-bench/bin/python benchmarks/gateway.py {arguments}` on {date}.
{machine}; {versions}.

The gateway, and past it the Cog server that it has started, are asked in turns, in a new order each time: it is the
same worker either way. Clients, servers, worker and bucket share the cores; what else ran on the machine when this
began had a load of {load:.1f}. The bucket is `benchmarks/door/bucket.py` on loopback, which keeps objects in memory: a
record's claim takes {put:.1f} ms there, most of it the gateway's own time. A prediction is recorded before it is
answered, and one whose id the caller chose is claimed before it is made, so a PUT through the gateway waits for two of
them and a POST for one; a bucket elsewhere takes as much longer as its PUTs do.

![One caller and many, with the gateway and without](gateway.svg)
"""

PARTS = {
    "card": """
## A card that is a clock

`benchmarks/door/card.py`: a runner that takes {card_ms:.0f} ms for an image, one at a time and without using a core,
and stores a 1024² PNG with the product's own store while the next is made.
""",
    "small": """
## The demo's small SDXL, on the CPU

The product's own runner with the small model of `make demo` (64² pixels, one thread): a picture takes little time and
a whole core, so what the gateway spends of the other counts for much.
""",
}

_ALONE = """One caller, {requests} requests each way, each compared with the bare one of its turn. The limit is
{most:.0f} ms more at the median. The last column is where the median lies with 95 % certainty, however far single
requests are apart.
"""

_MANY = """{callers} callers, {slots} slots, {rounds} rounds. Who is refused (409 by Cog, whose slots are all taken)
asks again after 0.1 s, then less often, up to 1 s. A virtual machine's speed drifts by more than what is looked for, so
the two are compared within each round, and the median of those ratios counts; behind it, where it lies with 95 %
certainty. The limit is {loss:.0%} less.
"""


def report(found: dict[str, Any]) -> str:
    lines = [
        HEAD.format(
            arguments=found["arguments"],
            date=found["date"],
            machine=found["machine"],
            versions=", ".join(found["versions"]),
            load=found["load"],
            put=median(found["put_seconds"]) * 1000,
        )
    ]
    for part, measured in found["parts"].items():
        lines.append(PARTS[part].format(card_ms=found["card_seconds"] * 1000))
        lines += _alone(measured["alone"])
        lines += _many(measured["many"], found["callers"], found["slots"])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def chart(found: dict[str, Any]) -> str:
    """The same as bars: one caller's milliseconds, and many callers' predictions a second."""
    panels = []
    for part, measured in found["parts"].items():
        alone = {way: median(seconds) * 1000 for way, seconds in measured["alone"].items()}
        rates = {
            way: median(one["rate"] for one in rounds) for way, rounds in measured["many"].items()
        }
        panels += [
            _panel(f"{NAMES[part]}: one caller, ms at the median", alone, "{:.1f} ms"),
            _panel(
                f"{NAMES[part]}: {found['callers']} callers, predictions a second", rates, "{:.2f}"
            ),
        ]
    return draw("What the gateway costs", panels)


def _panel(title: str, values: dict[str, float], form: str) -> Panel:
    bars = [
        Bar(way, value, form.format(value), "bound" if way == BARE else "ours")
        for way, value in values.items()
    ]
    return Panel(title, bars)


def _alone(alone: dict[str, list[float]]) -> list[str]:
    rows = []
    for way, seconds in alone.items():
        more = [one - beside for one, beside in zip(seconds, alone[BARE], strict=True)]
        least, middle, most = (_quantile(more, share) * 1000 for share in (0.25, 0.5, 0.75))
        rows.append(
            f"| {way} | {median(seconds) * 1000:.1f} | {_quantile(seconds, 0.9) * 1000:.1f} "
            f"| {middle:+.1f} ({least:+.1f} to {most:+.1f}) | {_certain(more, '{:+.1f}', 1000)} |"
        )
    return [
        _ALONE.format(requests=len(alone[BARE]), most=MOST_MS),
        "| way | median ms | 90 % within ms | more than bare, ms (middle half) | its median, 95 % |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _many(many: dict[str, list[dict[str, float]]], callers: int, slots: int) -> list[str]:
    bare = [one["rate"] for one in many[BARE]]
    rows = []
    for way, rounds in many.items():
        rates = [one["rate"] for one in rounds]
        ratios = [rate / beside for rate, beside in zip(rates, bare, strict=True)]
        cpu = f"{median(one['cpu'] for one in rounds) * 1000:.1f}" if way == PUT else ""
        rows.append(
            f"| {way} | {median(rates):.2f} | {min(rates):.2f} to {max(rates):.2f} "
            f"| {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {_certain(ratios, '{:.3f}')} "
            f"| {median(one['refused'] for one in rounds):.0f} | {cpu} |"
        )
    return [
        _MANY.format(callers=callers, slots=slots, rounds=len(many[BARE]), loss=MOST_LOSS),
        (
            "| way | predictions a second | min to max | times bare | its median, 95 % | refused "
            "| ms of a core the gateway spends on each |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _certain(values: list[float], form: str, times: float = 1) -> str:
    """Where the median lies, as text; "-" for too few."""
    within = median_within(values)
    return "-" if within is None else " to ".join(form.format(bound * times) for bound in within)


def median_within(values: list[float], certainty: float = 0.95) -> tuple[float, float] | None:
    """The two of `values` between which the median of what they are drawn from lies at least that surely.

    Each of n values lies below that median with a chance of a half, so how many do is binomial, however the values are
    distributed. None where even the least and the greatest are not far enough apart: 0.95 takes six.
    """
    ordered, missed, dropped = sorted(values), 0.0, 0
    while dropped < len(ordered) / 2:
        missed += 2 * comb(len(ordered), dropped) / 2 ** len(ordered)
        if missed > 1 - certainty:
            break
        dropped += 1
    return (ordered[dropped - 1], ordered[-dropped]) if dropped else None


def _quantile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(share * (len(seconds) - 1))]
