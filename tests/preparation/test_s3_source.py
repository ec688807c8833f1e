"""A model that lies in an S3 bucket, from there into another one: with its own keys, byte for byte, or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from demo.small_sdxl import write_small_sdxl
from preparation import PreparationError, Progress, Request, make_plan, prepare
from preparation.assemble import Prepared
from preparation.patterns import Patterns
from settings import SourceSettings, load_source_settings
from tests.preparation.conftest import SCRIPT, Models, Ran
from tests.preparation.sources import (
    REWRITTEN,
    files_of,
    keypair,
    publish_model,
    published_files,
    put_folder,
    source_variables,
)
from weights import Bucket, CorruptObjectError, ManifestError, find_snapshot
from weights.chunks import CHUNK_SIZE

Command = Callable[..., Ran]
RunFrom = Callable[..., Prepared]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def origin(new_bucket: Callable[[], str], admin: Any, models: Models) -> str:
    """A bucket with a diffusers folder at models/mine, and other things."""
    bucket = new_bucket()
    put_folder(admin, bucket, models.full, "models/mine")
    admin.put_object(Bucket=bucket, Key="models/", Body=b"")
    admin.put_object(Bucket=bucket, Key="models/mine/.DS_Store", Body=b"not needed")
    return bucket


@pytest.fixture
def access(s3: EmbeddedS3) -> SourceSettings:
    return load_source_settings(s3.environment())


@pytest.fixture
def run_from(access: SourceSettings, tmp_path: Path, quiet: Progress) -> RunFrom:
    """Plan and prepare an s3:// source; keyword arguments are those of `Request`."""

    def prepared(source: str, **options: Any) -> Prepared:
        defaults = {"access": access, "folder": tmp_path / "prepared", "name": "me/model"}
        request = Request(source, **{**defaults, **options})
        return prepare(request, make_plan(request), quiet)

    return prepared


def _weights_read(s3: EmbeddedS3, bucket: str) -> list[str]:
    return [
        request.key
        for request in s3.requests(bucket)
        if request.method == "GET" and request.key.endswith(".safetensors")
    ]


def test_folder_is_published_byte_for_byte_with_a_keypair_for_each_bucket(
    command: Command, origin: str, bucket: Bucket, s3: EmbeddedS3, models: Models
) -> None:
    # given keys of which each may do nothing in the other's bucket
    reader = keypair(s3, origin, "s3:ListBucket", "s3:GetObject")
    publisher = keypair(s3, bucket.name, "s3:ListBucket", "s3:GetObject", "s3:PutObject")
    # when
    ran = command(
        *(f"s3://{origin}/models/mine/", bucket.name, "--name", "me/model"),
        **{**s3.environment(publisher), **source_variables(s3, reader)},
    )
    # then
    assert ran.code == 0, ran.err
    assert f"  s3://{origin}/models/mine\n" in ran.out
    assert reader.secret_access_key not in ran.out + ran.err
    expected, published = files_of(models.full), published_files(bucket, "me/model")
    assert published.keys() == expected.keys()
    for path in expected.keys() - REWRITTEN:
        assert published[path] == expected[path], path
    source = (find_snapshot(bucket, "me/model").recipe or {})["source"]
    assert source["repo"] == f"s3://{origin}/models/mine"


def test_published_model_is_the_same_version_in_the_other_bucket(
    command: Command,
    bucket: Bucket,
    new_bucket: Callable[[], str],
    s3: EmbeddedS3,
    small_sdxl: Path,
    tmp_path: Path,
) -> None:
    # given a model with a recipe of its own, published before, and a keypair that may not list
    first = Bucket(load_source_settings(s3.environment()), new_bucket())
    publish_model(small_sdxl, first, "me/model", tmp_path / "first")
    reader = keypair(s3, first.name, "s3:GetObject")
    # when
    ran = command(
        *(f"s3://{first.name}/me/model", bucket.name, "--name", "their/model"),
        **source_variables(s3, reader),
    )
    # then
    assert ran.code == 0, ran.err
    before, after = find_snapshot(first, "me/model"), find_snapshot(bucket, "their/model")
    assert after.version == before.version
    assert after.recipe == before.recipe
    assert published_files(bucket, "their/model") == published_files(first, "me/model")


def test_version_of_a_published_model_can_be_named_by_its_folder(
    run_from: RunFrom,
    new_bucket: Callable[[], str],
    access: SourceSettings,
    small_sdxl: Path,
    models: Models,
    tmp_path: Path,
) -> None:
    # given a model whose older version is not the one that is served
    bucket = Bucket(access, new_bucket())
    older = publish_model(small_sdxl, bucket, "me/model", tmp_path / "first")
    publish_model(models.half, bucket, "me/model", tmp_path / "first")
    # when, then
    assert run_from(f"s3://{bucket.name}/me/model").recipe.dtype == "float16"
    assert run_from(f"s3://{bucket.name}/me/model/{older}").recipe.steps == (4,)


def test_published_object_that_is_not_what_was_published_is_refused(
    run_from: RunFrom,
    new_bucket: Callable[[], str],
    access: SourceSettings,
    small_sdxl: Path,
    admin: Any,
    tmp_path: Path,
) -> None:
    # given one byte flipped, which neither size nor a fresh ETag tells
    bucket = Bucket(access, new_bucket())
    version = publish_model(small_sdxl, bucket, "me/model", tmp_path / "first")
    key = f"me/model/{version}/{UNET}"
    content = bytearray(bucket.get(key, limit=2**30))
    content[-1] ^= 1
    admin.put_object(Bucket=bucket.name, Key=key, Body=bytes(content))
    # when, then
    with pytest.raises(CorruptObjectError, match=f"s3://{bucket.name}/{key} is corrupt"):
        run_from(f"s3://{bucket.name}/me/model")


def test_latest_without_its_manifest_is_refused(run_from: RunFrom, origin: str, admin: Any) -> None:
    admin.put_object(
        Bucket=origin, Key="models/mine/latest.json", Body=b'{"version": "%s"}' % (b"0" * 32)
    )
    with pytest.raises(ManifestError, match=r"names a version whose manifest, .*cannot be read"):
        run_from(f"s3://{origin}/models/mine")


def test_killed_run_goes_on_with_what_is_missing(
    environment: dict[str, str],
    new_bucket: Callable[[], str],
    bucket: Bucket,
    s3: EmbeddedS3,
    admin: Any,
    tmp_path: Path,
) -> None:
    # given a UNet of several chunks, of which the second does not come, and a run that is killed waiting for it
    origin, model = new_bucket(), write_small_sdxl(tmp_path / "large", width=2, lightning=False)
    put_folder(admin, origin, model, "large")
    size = (model / UNET).stat().st_size
    assert CHUNK_SIZE < size <= 3 * CHUNK_SIZE
    arguments = [SCRIPT, f"s3://{origin}/large", bucket.name, "--name", "me/large", "-j", "1"]
    place = ["--destdir", str(tmp_path / "prepared")]
    run = [sys.executable, *map(str, arguments), *place]
    s3.inject(Fault("hold", bucket=origin, key=f"large/{UNET}", skip=1))
    child = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE)
    try:
        s3.wait_for_held_request()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        s3.clear_faults()
    assert list(bucket.list("")) == []
    before = s3.requests(origin)
    arrived = {request.key for request in before if request.status == 206} - {f"large/{UNET}"}
    assert arrived
    s3.forget_requests()
    # when
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    # then only what had not arrived is asked for, the UNet from its second chunk on
    assert done.returncode == 0, done.stderr
    again = [request for request in s3.requests(origin) if request.range]
    assert {request.key for request in again} & arrived == set()
    assert [request.range for request in again if request.key == f"large/{UNET}"] == [
        f"bytes={start}-{min(start + CHUNK_SIZE, size) - 1}"
        for start in range(CHUNK_SIZE, size, CHUNK_SIZE)
    ]
    published = published_files(bucket, "me/large")
    assert published[UNET] == (model / UNET).read_bytes()
    assert not list((tmp_path / "prepared").rglob("*.part"))


def test_nothing_is_downloaded_twice(run_from: RunFrom, origin: str, s3: EmbeddedS3) -> None:
    source = f"s3://{origin}/models/mine"
    run_from(source)
    assert len(_weights_read(s3, origin)) == 4
    s3.forget_requests()
    run_from(source, name="another/model")
    assert _weights_read(s3, origin) == []


def test_object_that_changed_since_it_was_listed_is_refused_and_then_taken_as_it_is(
    run_from: RunFrom,
    access: SourceSettings,
    origin: str,
    admin: Any,
    models: Models,
    tmp_path: Path,
    quiet: Progress,
) -> None:
    source, other = f"s3://{origin}/models/mine", (models.other_full / UNET).read_bytes()
    request = Request(source, name="me/model", access=access, folder=tmp_path / "prepared")
    plan = make_plan(request)
    admin.put_object(Bucket=origin, Key=f"models/mine/{UNET}", Body=other)
    with pytest.raises(PreparationError, match=rf"{UNET}: it was replaced since it was listed"):
        prepare(request, plan, quiet)
    assert not (tmp_path / "prepared/me--model").exists()
    # and when it is asked for again
    assert (run_from(source).folder / UNET).read_bytes() == other


def test_object_that_disappears_is_named(
    access: SourceSettings, origin: str, admin: Any, tmp_path: Path, quiet: Progress
) -> None:
    source = f"s3://{origin}/models/mine"
    request = Request(source, name="me/model", access=access, folder=tmp_path / "prepared")
    plan = make_plan(request)
    admin.delete_object(Bucket=origin, Key=f"models/mine/{UNET}")
    with pytest.raises(PreparationError, match=rf"{UNET}: it is not there any more"):
        prepare(request, plan, quiet)


def test_file_that_was_damaged_on_this_disk_is_found_out(
    run_from: RunFrom, origin: str, tmp_path: Path
) -> None:
    run_from(f"s3://{origin}/models/mine")
    blob = min((tmp_path / "prepared/sources").rglob("*-vocab.json"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(PreparationError, match=rf"damaged on this disk.*Delete {blob}"):
        run_from(f"s3://{origin}/models/mine", name="another/model")


def test_chunk_that_was_noted_but_never_reached_the_disk_is_read_again(
    run_from: RunFrom, origin: str, models: Models, tmp_path: Path, s3: EmbeddedS3
) -> None:
    # given an unfinished file as a loss of power leaves it: the note is there, the bytes are not
    run_from(f"s3://{origin}/models/mine")
    blobs = (tmp_path / "prepared/sources").rglob("*-diffusion_pytorch_model.safetensors")
    blob = max(blobs, key=lambda file: file.stat().st_size)
    blob.unlink()
    blob.with_name(f"{blob.name}.part").write_bytes(bytes((models.full / UNET).stat().st_size))
    s3.forget_requests()
    # when, then
    folder = run_from(f"s3://{origin}/models/mine", name="another/model").folder
    assert (folder / UNET).read_bytes() == (models.full / UNET).read_bytes()
    assert _weights_read(s3, origin) == [f"models/mine/{UNET}"]


def test_dry_run_reads_no_weights(
    command: Command, origin: str, bucket: Bucket, s3: EmbeddedS3
) -> None:
    ran = command(f"s3://{origin}/models/mine", bucket.name, "--name", "me/model", "--dry-run")
    assert ran.code == 0, ran.err
    assert f"s3://{origin}/models/mine: {UNET}" in ran.out
    assert _weights_read(s3, origin) == []
    assert list(bucket.list("")) == []


def test_patterns_narrow_a_bucket_as_they_do_a_repo(
    run_from: RunFrom, new_bucket: Callable[[], str], admin: Any, models: Models
) -> None:
    bucket = new_bucket()
    put_folder(admin, bucket, models.base, "base")
    assert run_from(f"s3://{bucket}/base").recipe.dtype == "float16"
    plain = run_from(f"s3://{bucket}/base", patterns=Patterns(ignore=("*.fp16.*",)))
    assert plain.recipe.dtype == "float32"


def test_whole_bucket_can_be_the_folder(
    run_from: RunFrom, new_bucket: Callable[[], str], admin: Any, models: Models
) -> None:
    bucket = new_bucket()
    for path, content in files_of(models.half).items():
        admin.put_object(Bucket=bucket, Key=path, Body=content)
    assert run_from(f"s3://{bucket}").recipe.dtype == "float16"
