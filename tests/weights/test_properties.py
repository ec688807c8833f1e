"""Whatever a bucket answers, a manifest and a safetensors header are read right or refused in words.

The documents are random, or valid ones with anything in them altered. Runs are the same every time; what a random
search has found stands beside the property as an example.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from weights.chunks import CHUNK_SIZE
from weights.errors import WeightsError
from weights.manifest import (
    FORMAT,
    FileEntry,
    Manifest,
    dump_manifest,
    is_version,
    make_manifest,
    parse_latest,
    parse_manifest,
)
from weights.safetensors_layout import (
    DTYPE_BYTES,
    HEADER_LIMIT,
    LENGTH_BYTES,
    TensorPlace,
    _count,
    header_length,
    parse_header,
)

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


# --- JSON, and what passes for it


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


# --- Manifests


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """The document under the version its content has, derived here a second time; unchanged if it has none."""
    try:
        fields = ("path", "size", "sha256", "chunks")
        plain = json.loads(write(document))
        content = {
            "files": sorted([entry[field] for field in fields] for entry in plain["files"]),
            "format": FORMAT,
            "recipe": plain["recipe"],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return document
    return document | {"version": hashlib.sha256(text.encode()).hexdigest()[:32]}


def document_of(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(dump_manifest(manifest))
    return document


def check_manifest(data: bytes) -> Manifest | None:
    """Refused in words, or what was published: then it can be written again, and others can read it."""
    try:
        manifest = parse_manifest(data, WHERE)
    except WeightsError as error:
        check_message(error)
        return None
    written = dump_manifest(manifest)
    assert parse_manifest(written, WHERE) == manifest
    plain = json.loads(written, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert signed(plain) == plain
    assert all(type(entry["size"]) is int for entry in plain["files"])
    return manifest


NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='/\\:*?"<>|.'),
    min_size=1,
    max_size=8,
)
DIGESTS = st.integers(0, 2**256 - 1).map("{:064x}".format)


@st.composite
def entries(draw: st.DrawFn) -> FileEntry:
    """A file of no chunk up to three, some exactly as long as their chunks."""
    chunks = draw(st.lists(DIGESTS, max_size=3))
    short = draw(st.sampled_from([0, 1, 1000, CHUNK_SIZE - 1])) if chunks else 0
    return FileEntry(
        path="/".join(draw(st.lists(NAMES, min_size=1, max_size=3))) + ".safetensors",
        size=len(chunks) * CHUNK_SIZE - short,
        sha256=draw(DIGESTS),
        chunks=tuple(chunks),
    )


FILES = st.lists(entries(), min_size=1, max_size=3, unique_by=lambda entry: entry.path.casefold())
MANIFESTS = st.builds(make_manifest, FILES, RECIPES)
PUBLISHED = make_manifest(
    [
        FileEntry(path="unet/a.safetensors", size=3, sha256="ab" * 32, chunks=("cd" * 32,)),
        FileEntry(path="model_index.json", size=0, sha256="ef" * 32, chunks=()),
    ],
    {"steps": [4], "scheduler": {"class": "Euler", "shift": 1.5}},
)


def with_recipe(text: str) -> bytes:
    return write(signed(document_of(PUBLISHED) | {"recipe": Raw(text)})).encode()


@given(BYTES)
@example(nested(100_000).encode())
@example(b"9" * (DIGIT_LIMIT + 1))
@reproducible
def test_no_bytes_make_a_manifest_or_latest_fail_without_words(data: bytes) -> None:
    assert check_manifest(data) is None
    try:
        version = parse_latest(data, WHERE)
    except WeightsError as error:
        check_message(error)
    else:
        assert is_version(version)


@given(st.data())
@settings(reproducible, max_examples=200)
def test_an_altered_manifest_is_refused_or_says_what_it_said(data: st.DataObject) -> None:
    document = data.draw(altered(document_of(PUBLISHED)))

    manifest = check_manifest(data.draw(encoded(write(document))))

    assert manifest in (None, PUBLISHED)


@pytest.mark.parametrize(
    "change",
    [
        {"\n\x1b[31m": 0},  # was repeated as it stands, and could write lines of its own into a log
        {"x" * 20_000: 0},
        {"files": [{"path": "a", "size": Raw("9" * DIGIT_LIMIT), "sha256": "", "chunks": []}]},
        {"files": [document_of(PUBLISHED)["files"][0] | {"size": 0.0}]},
    ],
    ids=range(4),
)
def test_a_message_is_short_and_printable(change: dict[str, Any]) -> None:
    assert check_manifest(write(document_of(PUBLISHED) | change).encode()) is None


@given(st.data())
@settings(reproducible, max_examples=200)
def test_a_manifest_under_its_right_version_is_read_or_refused(data: st.DataObject) -> None:
    document = signed(data.draw(altered(document_of(PUBLISHED))))

    check_manifest(write(document).encode())


@pytest.mark.parametrize(
    "recipe",
    [
        '{"a":' * 300 + "1" + "}" * 300,  # was read, and could not be written
        '{"a":NaN}',  # was written as null, and then refused
        '{"\\ud800":1}',  # was written as another name, and then refused
        '{"a":{"\\ud800":1}}',  # was read, and could not be written
        '{"a":1e999}',
    ],
)
def test_a_recipe_that_cannot_be_written_again_is_refused(recipe: str) -> None:
    assert check_manifest(with_recipe(recipe)) is None


def test_of_many_wrong_entries_only_the_first_is_described() -> None:
    # A manifest of five million such took 40 seconds and 6 GB to refuse.
    for change in ({"files": [1] * 10_000}, {f"x{number}": 1 for number in range(10_000)}):
        with pytest.raises(WeightsError, match=r"files\.0|'x0'") as caught:
            parse_manifest(write(document_of(PUBLISHED) | change).encode(), WHERE)
        assert not re.search(r"files\.1|x1|more", str(caught.value))


def test_no_depth_of_nesting_gets_past_the_refusal() -> None:
    # Some 987 levels deep, json could read a recipe and then not write it: RecursionError.
    document = write(document_of(PUBLISHED) | {"recipe": {"a": Raw("#")}})
    files = json.dumps(
        sorted([e.path, e.size, e.sha256, e.chunks] for e in PUBLISHED.files), separators=(",", ":")
    )
    for depth in range(1, 1100):
        content = f'{{"files":{files},"format":"{FORMAT}","recipe":{{"a":{nested(depth)}}}}}'
        version = hashlib.sha256(content.encode()).hexdigest()[:32]
        data = document.replace("#", nested(depth)).replace(PUBLISHED.version, version)
        assert (check_manifest(data.encode()) is not None) == (depth < 64)


@given(MANIFESTS)
@reproducible
def test_a_published_manifest_is_read_back_as_it_was(manifest: Manifest) -> None:
    assert parse_manifest(dump_manifest(manifest), WHERE) == manifest
    assert signed(document_of(manifest))["version"] == manifest.version


@given(st.dictionaries(ANY_TEXT | st.integers(), JSON | st.tuples(JSON) | st.binary(), max_size=3))
@example({"guidance": math.nan})
@example({"\ud800": 1})
@example({"seed": 10**DIGIT_LIMIT})
@example({"class": object})
@reproducible
def test_a_recipe_is_refused_or_comes_back_as_json_has_it(recipe: dict[Any, Any]) -> None:
    try:
        manifest = make_manifest(PUBLISHED.files, recipe)
    except WeightsError:
        return
    assert parse_manifest(dump_manifest(manifest), WHERE) == manifest
    assert manifest.recipe == json.loads(json.dumps(recipe))


@given(st.data())
@reproducible
def test_an_altered_latest_names_its_version_or_is_refused(data: st.DataObject) -> None:
    document = data.draw(altered({"version": VERSION}))
    try:
        version = parse_latest(data.draw(encoded(write(document))), WHERE)
    except WeightsError as error:
        check_message(error)
    else:
        assert is_version(version)


# --- safetensors headers


def framed(header: bytes, tail: bytes) -> bytes:
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + tail


def check_layout(data: bytes) -> tuple[TensorPlace, ...] | None:
    """Refused in words, or tensors that fill the file exactly, where safetensors itself finds them."""
    try:
        length = header_length(data, WHERE, len(data))
        places = parse_header(memoryview(data)[:length], WHERE, len(data))
    except WeightsError as error:
        check_message(error)
        return None
    borders = [length, *(place.end for place in places)]
    assert [place.start for place in places] == borders[:-1]
    assert borders[-1] == len(data)
    for place in places:
        assert all(type(number) is int for number in (*place.shape, place.start, place.end))
        assert place.end - place.start == math.prod(place.shape) * DTYPE_BYTES[place.dtype]
    ours = {
        place.name: (place.dtype, place.shape, data[place.start : place.end]) for place in places
    }
    assert read_by_safetensors(data) in (ours, None)
    return places


def read_by_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors itself finds in the file; None where it refuses it."""
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in tensors
    }


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """A header that can be true, its tensors in any order, with every dtype there is."""
    names = draw(st.lists(PLAIN_TEXT, max_size=4, unique=True))
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    return dict(draw(st.permutations(list(header.items()))))


def tensor_bytes(header: dict[str, Any]) -> int:
    offsets = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return max(offsets, default=0)


def one_tensor(tail: bytes = b"1234", **changes: Any) -> bytes:
    entry = {"dtype": "U8", "shape": [len(tail)], "data_offsets": [0, len(tail)]} | changes
    return framed(write({"a": entry}).encode(), tail)


@given(BYTES, st.binary(max_size=8))
@example(b"\xff" * 20_000, b"")  # the message repeated every byte
@example(nested(100_000).encode(), b"")
@reproducible
def test_no_header_fails_without_words(header: bytes, tail: bytes) -> None:
    check_layout(framed(header, tail))
    check_layout(header)


@given(st.binary(max_size=16), st.integers(0, 2**70))
@example((HEADER_LIMIT + 1).to_bytes(8, "little"), 2**40)
@example(b"\xff" * 8, 2**64 + 7)
@reproducible
def test_a_header_ends_inside_its_file_or_is_refused(first: bytes, size: int) -> None:
    try:
        length = header_length(first, WHERE, size)
    except WeightsError as error:
        check_message(error)
    else:
        assert LENGTH_BYTES <= length <= min(size, LENGTH_BYTES + HEADER_LIMIT)


@given(headers(), st.data())
@settings(reproducible, max_examples=250)
def test_an_altered_header_is_refused_or_true(header: dict[str, Any], data: st.DataObject) -> None:
    size = max(0, tensor_bytes(header) + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1, 4])))
    text = write(data.draw(altered(header)))

    check_layout(framed(data.draw(encoded(text)), bytes(size)))


@pytest.mark.parametrize(
    "data",
    [
        # The file's end had more digits than Python writes: ValueError while saying so.
        one_tensor(shape=[Raw("9" * DIGIT_LIMIT)], data_offsets=[0, Raw("9" * DIGIT_LIMIT)]),
        one_tensor(data_offsets=[4, 0]),
        one_tensor(shape=[2**62, 4, 4]),  # 2 to the 66, which is 4 when it wraps around at 64 bits
        one_tensor(shape=[-2, -2]),
        one_tensor(shape=Raw("[1,4.0]")),
        one_tensor(shape=[True, 4]),
        one_tensor(b"1", shape=""),  # was taken for a scalar's
        one_tensor(b"1", shape={}),
        one_tensor(dtype=[]),
        one_tensor(dtype="x" * 20_000),
        framed(write({"x" * 20_000: 3}).encode(), b""),
        framed(b'{"a":1,"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        framed('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.encode("utf-16"), b"1234"),
        framed(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
    ],
    ids=range(14),
)
def test_a_header_that_was_believed_or_broke_the_reader_is_refused(data: bytes) -> None:
    assert check_layout(data) is None


def test_a_shape_is_not_multiplied_beyond_what_its_file_could_hold() -> None:
    # 23,000 such lengths fit into a header, and their product has a hundred million digits.
    length = 10 ** (DIGIT_LIMIT - 1)

    assert _count([length] * 23_000, limit=1000) == length
    assert _count([length] * 23_000 + [0], limit=1000) == 0
    assert check_layout(one_tensor(shape=[length] * 200)) is None


@given(headers())
@reproducible
def test_a_true_header_is_read_as_it_was_written(header: dict[str, Any]) -> None:
    data = framed(write(header).encode(), bytes(tensor_bytes(header)))

    places = check_layout(data)

    assert places is not None
    assert {place.name: (place.dtype, list(place.shape)) for place in places} == {
        name: (entry["dtype"], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    assert read_by_safetensors(data) is not None


DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
SHAPES = st.lists(st.integers(0, 4), max_size=3)
ARRAYS = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
    st.sampled_from(DTYPES),
    SHAPES,
)


@given(st.dictionaries(PLAIN_TEXT, ARRAYS, max_size=4))
@reproducible
def test_what_safetensors_saves_lies_where_it_says(tensors: dict[str, Any]) -> None:
    data = save(tensors, metadata={"format": "pt"})

    places = check_layout(data)

    assert places is not None
    assert {place.name: data[place.start : place.end] for place in places} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
