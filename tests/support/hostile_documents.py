"""Documents that a bucket might answer: random ones, and valid ones with anything in them altered."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from weights.errors import WeightsError

WHERE = "s3://b/m/x"
MESSAGE_LIMIT = 4000  # characters: a message is for a log and a person, whatever the bucket holds
VERSION = "0123456789abcdef" * 2
DIGIT_LIMIT = (
    sys.int_info.default_max_str_digits
)  # beyond it, Python refuses to read or write a whole number

reproducible = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Raw:
    """JSON as it stands. As a key it stands beside the same key written plainly, so a name can come twice."""

    text: str


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def write(value: Any) -> str:
    """JSON text of a document that may have `Raw` in it."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{write(key)}:{write(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # with lone surrogates
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=8
)
PLAIN_TEXT = st.text(max_size=8)
PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | PLAIN_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(PLAIN_TEXT, inner),
    max_leaves=12,
)
RECIPES = st.dictionaries(PLAIN_TEXT, PLAIN_JSON, max_size=4)
NASTY = st.builds(
    Raw,
    st.sampled_from(
        [
            *("NaN", "Infinity", "-Infinity", "1e999", "1.0", "4.0", "-0", "-1", "0", "1", "2"),
            *(str(power + offset) for power in (2**31, 2**53, 2**63, 2**64) for offset in (-1, 0)),
            *("9" * DIGIT_LIMIT, "-" + "9" * DIGIT_LIMIT, "9" * (DIGIT_LIMIT + 1)),
            *('"../x"', '"a\\u0000"', '"\\ud800"', '"\\n\\u001b[31m"', f'"{"x" * 20_000}"', '"4"'),
            *("null", "true", "[]", "{}", '""', nested(100_000)),
            *("[" + ",".join(["9" * DIGIT_LIMIT] * 9) + "]", "[" + ",".join("1" * 9999) + "]"),
        ]
    )
    | st.integers(1, 1100).map(nested),
)
VALUES = st.integers(-3, 20) | st.lists(st.integers(0, 6), max_size=3) | NASTY | JSON
BYTES = st.binary(max_size=64) | JSON.map(lambda value: write(value).encode())


def containers(value: Any) -> Iterator[dict[Any, Any] | list[Any]]:
    """Every object and every list in a document, itself included."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


@st.composite
def altered(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """The document after one to three alterations, each anywhere in it: replaced, nudged, removed, added, doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(containers(document))))
        keys: list[Any] = list(place if isinstance(place, dict) else range(len(place)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        match draw(st.sampled_from(["replace", "nudge", "remove", "add", "double", "swap"])):
            case "nudge" if isinstance(
                place[key], int
            ):  # a little off: what a subtle lie looks like
                place[key] += draw(st.integers(-4, 4))
            case "remove":
                del place[key]
            case "add" if isinstance(place, list):
                place.insert(key, draw(VALUES))
            case "add":
                place[draw(ANY_TEXT)] = draw(VALUES)
            case "double" if isinstance(place, dict):
                place[Raw(write(key))] = draw(VALUES)
            case "double":
                place.append(copy.deepcopy(place[key]))
            case "swap":
                place[key] = copy.deepcopy(draw(st.sampled_from(list(containers(document)))))
            case _:
                place[key] = draw(VALUES)
    return document


@st.composite
def encoded(draw: st.DrawFn, text: str) -> bytes:
    """The text as bytes: mostly as it should be, sometimes cut, flipped or in another encoding."""
    data = text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32"])))
    if data and draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 2)) :]
    return data


def check_message(error: WeightsError) -> None:
    """One printable line of a bearable length that names the object: nothing in a bucket can forge a log."""
    message = str(error)
    assert message.startswith(WHERE)
    assert message.isprintable()
    assert len(message) < MESSAGE_LIMIT
