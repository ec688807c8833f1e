"""Which metrics an expression in PromQL names: enough of its grammar to tell them from functions and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

TOKEN = re.compile(
    r"""
    (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
  | (?P<comment>\#[^\n]*)
  | (?P<number>(?:\d+(?:ms|[smhdwy]))+|0[xX][0-9a-fA-F]+|\d*\.?\d+(?:[eE][+-]?\d+)?)
  | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
  | (?P<sign>[^\s])
    """,
    re.VERBOSE,
)
# A list of labels in parentheses follows these.
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
KEYWORDS = GROUPING | {"and", "or", "unless", "bool", "offset", "inf", "nan", "atan2"}
AGGREGATIONS = {
    "sum",
    "min",
    "max",
    "avg",
    "group",
    "stddev",
    "stdvar",
    "count",
    "count_values",
    "bottomk",
    "topk",
    "quantile",
}


def metric_names(expression: str) -> set[str]:
    """Names of metrics, those given as `{__name__="x"}` included; raises ValueError where a name is a pattern."""
    return set(_names([token for token in TOKEN.finditer(expression) if token["comment"] is None]))


def _names(tokens: list[re.Match[str]]) -> Iterator[str]:
    position = 0
    while position < len(tokens):
        text = tokens[position].group()
        following = tokens[position + 1].group() if position + 1 < len(tokens) else ""
        if text == "{":
            end = _closing(tokens, position, "}")
            yield from _named_inside(tokens[position + 1 : end])
            position = end
        elif text == "[":
            position = _closing(tokens, position, "]")
        elif tokens[position]["name"] is None:
            pass
        elif text.lower() in GROUPING:
            if following == "(":
                position = _closing(tokens, position + 1, ")")
        elif text.lower() not in KEYWORDS | AGGREGATIONS and following != "(":
            yield text
        position += 1


def _named_inside(tokens: list[re.Match[str]]) -> Iterator[str]:
    for position, token in enumerate(tokens):
        if token.group() == "__name__":
            if tokens[position + 2]["string"] is None:
                raise ValueError("a metric's name is given as a pattern: name the metrics")
            yield tokens[position + 2].group()[1:-1]


def _closing(tokens: list[re.Match[str]], opening: int, sign: str) -> int:
    return next(i for i in range(opening, len(tokens)) if tokens[i].group() == sign)
