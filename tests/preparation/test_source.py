"""What kind of place a SOURCE names, told by its form alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from preparation import Request, UsageError, make_plan
from preparation.source import SourceKind, parse_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ByteDance/SDXL-Lightning", (SourceKind.HUB, "", "")),
        ("./models/mine", (SourceKind.FOLDER, "", "")),
        ("/models/mine", (SourceKind.FOLDER, "", "")),
        ("s3:/models/mine", (SourceKind.FOLDER, "", "")),
        ("s3://models", (SourceKind.S3, "models", "")),
        ("s3://models/", (SourceKind.S3, "models", "")),
        ("S3://models/team/mine/", (SourceKind.S3, "models", "team/mine")),
        ("gs://models/mine", (SourceKind.GCS, "models", "mine")),
        ("someone/model:v2/model.safetensors", (SourceKind.HUB_FILE, "", "")),
        ("./model.safetensors", (SourceKind.FILE, "", "")),
        ("models/model.safetensors", (SourceKind.FILE, "", "")),
    ],
)
def test_source_is_taken_apart(text: str, expected: tuple[SourceKind, str, str]) -> None:
    name = parse_source(text, named=True)
    assert (name.kind, name.bucket, name.prefix) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("az://models/mine", r"az://models/mine cannot be a source.*s3://BUCKET/FOLDER"),
        ("https://huggingface.co/a/b", r"https://huggingface\.co/a/b cannot be a source"),
        ("https://huggingface.co/a/b/c.safetensors", r"OWNER/NAME:FILE\.safetensors"),
        ("s3://", "its bucket '' is not a bucket name"),
        ("s3://a/models", "its bucket 'a' is not a bucket name"),
        ("s3://models/../secrets", r"its folder '\.\./secrets' must be a plain path"),
        ("s3://models/a//b", "its folder 'a//b' must be a plain path"),
        ("s3://models/a\\b", r"its folder 'a\\\\b' must not contain"),
        ("s3://models/a.safetensors", "of a bucket a whole folder is read. Download the file"),
        ("someone/model:model.ckpt", "model.ckpt is a pickle, which can run any code"),
        ("./model.ckpt", "model.ckpt is a pickle"),
        ("someone/model:model.onnx", "only checkpoints in safetensors"),
    ],
)
def test_source_that_can_be_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(text, named=True)


def test_source_in_a_bucket_needs_a_name() -> None:
    with pytest.raises(UsageError, match=r"from an S3 bucket needs a name: .* --name me/mine"):
        make_plan(Request("s3://models/team/mine"))


@pytest.mark.parametrize("source", ["s3://models/mine", "./mine"])
def test_revision_of_what_has_none_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match=r"--revision is of a Hub repo.*which has one state"):
        make_plan(Request(source, name="me/model", revision="main"))


def test_folder_is_meant_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("models/mine", named=False).kind is SourceKind.HUB
    assert parse_source("models/mine", named=True).kind is SourceKind.FOLDER
