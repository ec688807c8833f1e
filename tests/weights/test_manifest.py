"""A manifest names what it holds after its content, and is refused when it names what it must not."""

import json

import pytest

from weights.errors import ManifestError
from weights.manifest import (
    CHUNK_SIZE,
    FileEntry,
    dump_latest,
    dump_manifest,
    make_manifest,
    parse_latest,
    parse_manifest,
)

DIGEST = "ab" * 32


def entry(path: str = "unet/model.safetensors", size: int = 3, sha256: str = DIGEST) -> FileEntry:
    return FileEntry(path=path, size=size, sha256=sha256, chunks=(DIGEST,))


def document(**changes: object) -> bytes:
    fields = json.loads(dump_manifest(make_manifest([entry()], {"steps": [4]})))
    return json.dumps(fields | changes).encode()


def test_a_manifest_survives_the_bucket():
    manifest = make_manifest([entry(), entry("vae/model.safetensors")], {"steps": (4,)})
    assert parse_manifest(dump_manifest(manifest), "here") == manifest


def test_the_same_content_has_the_same_version_in_any_order():
    files = [entry("a"), entry("b")]
    assert (
        make_manifest(files, {"x": 1, "y": 2}).version
        == make_manifest(files[::-1], {"y": 2, "x": 1}).version
    )


@pytest.mark.parametrize(
    ("files", "recipe"),
    [
        ([entry(sha256="cd" * 32)], {"steps": [4]}),
        ([entry(path="unet/other.safetensors")], {"steps": [4]}),
        ([entry(size=4)], {"steps": [4]}),
        ([entry(), entry("more")], {"steps": [4]}),
        ([entry()], {"steps": [8]}),
    ],
)
def test_other_content_has_another_version(files, recipe):
    assert make_manifest(files, recipe).version != make_manifest([entry()], {"steps": [4]}).version


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"steps": [8]}},
        {"version": "0" * 32},
        {"files": [entry(sha256="cd" * 32).model_dump(mode="json")]},
    ],
)
def test_a_manifest_altered_after_publishing_is_refused(change):
    with pytest.raises(ManifestError, match="altered after publishing"):
        parse_manifest(document(**change), "s3://b/m/manifest.json")


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "unet/../../x",
        "unet//x",
        "./x",
        "unet\\..\\x",
        "C:/x",
        "a\0b",
        "",
        "unet/",
        "manifest.json",
        "x" * 600,
    ],
)
def test_a_path_that_could_leave_the_folder_is_refused_by_name(path):
    files = [entry().model_dump(mode="json") | {"path": path}]
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document(files=files), "s3://b/m/manifest.json")
    assert "s3://b/m/manifest.json is refused" in str(caught.value)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("path", ["unet/model.bin", "model.ckpt", "a.PT", "x.pkl"])
def test_a_pickle_is_refused_by_name(path):
    with pytest.raises(ManifestError, match="may hold a pickle"):
        parse_manifest(document(files=[entry().model_dump() | {"path": path}]), "here")


def test_a_path_listed_twice_is_refused():
    with pytest.raises(ManifestError, match="listed twice"):
        make_manifest([entry(), entry()], {})


@pytest.mark.parametrize("paths", [("A.json", "a.json"), ("a", "a/b"), ("unet", "unet/x/y")])
def test_paths_that_are_one_on_some_system_are_refused(paths):
    with pytest.raises(ManifestError):
        make_manifest([entry(path) for path in paths], {})


@pytest.mark.parametrize("path", [".env", "unet/.hidden/x", "Manifest.JSON"])
def test_names_that_are_kept_for_other_uses_are_refused(path):
    with pytest.raises(ManifestError, match="here"):
        parse_manifest(document(files=[entry().model_dump() | {"path": path}]), "here")


@pytest.mark.parametrize(
    ("size", "digests"), [(0, 1), (1, 0), (CHUNK_SIZE, 2), (CHUNK_SIZE + 1, 1)]
)
def test_every_chunk_has_one_digest(size, digests):
    with pytest.raises(ValueError, match="chunk digests"):
        FileEntry(path="a", size=size, sha256=DIGEST, chunks=(DIGEST,) * digests)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b"{}", b"\xff", b"[" * 100_000], ids=range(6)
)
def test_what_is_not_a_manifest_is_refused_naming_the_object(data):
    with pytest.raises(ManifestError, match=r"s3://b/m/manifest\.json"):
        parse_manifest(data, "s3://b/m/manifest.json")


def test_latest_names_a_version():
    assert parse_latest(dump_latest("0" * 32), "here") == "0" * 32


@pytest.mark.parametrize(
    "data", [b"{}", b'{"version": "../x"}', b'{"version": 3}', b"nonsense", b"[]"]
)
def test_a_latest_that_names_no_version_is_refused(data):
    with pytest.raises(ManifestError, match=r"s3://b/m/latest\.json"):
        parse_latest(data, "s3://b/m/latest.json")
