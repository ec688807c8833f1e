"""Whatever a bucket answers, a manifest, a recipe and `latest` are read right or refused in words.

The documents are random, or valid ones with anything in them altered. Runs are the same every time; what a random
search has found stands beside the property as an example.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.hostile_documents import (
    ANY_TEXT,
    BYTES,
    DIGIT_LIMIT,
    JSON,
    RECIPES,
    VERSION,
    WHERE,
    Raw,
    altered,
    check_message,
    encoded,
    nested,
    reproducible,
    write,
)
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
