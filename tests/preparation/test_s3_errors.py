"""A source in a bucket that cannot be read, or not as a folder: what a person is told, and nothing published."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from preparation import PreparationError, Progress, Request, UsageError, make_plan, prepare
from preparation.prepare import exit_code
from settings import load_source_settings
from tests.preparation.conftest import Models, Ran
from tests.preparation.sources import files_of, keypair, put_folder, source_variables
from tests.support.hub import LoopbackHub
from weights import Bucket


@pytest.fixture
def origin(new_bucket: Callable[[], str], admin: Any, models: Models) -> str:
    """A bucket with a diffusers folder at models/mine."""
    bucket = new_bucket()
    put_folder(admin, bucket, models.half, "models/mine")
    return bucket


@pytest.fixture
def request_from(s3: EmbeddedS3, tmp_path: Path) -> Callable[..., Request]:
    """A request for an s3:// source; keyword arguments change the environment's variables."""

    def made(source: str, **changed: str) -> Request:
        access = load_source_settings({**s3.environment(), **changed})
        return Request(source, name="me/model", access=access, folder=tmp_path / "prepared")

    return made


def test_bucket_that_does_not_exist(request_from: Callable[..., Request]) -> None:
    with pytest.raises(UsageError, match=r"the bucket does not exist. Check its name") as raised:
        make_plan(request_from("s3://no-such-bucket/models/mine"))
    assert "AWS_ENDPOINT_URL_S3" in str(raised.value)


@pytest.mark.parametrize("actions", [["s3:PutObject"], ["s3:GetObject"]])
def test_keypair_without_the_rights_is_told_which_it_needs(
    request_from: Callable[..., Request], s3: EmbeddedS3, origin: str, actions: list[str]
) -> None:
    keys = source_variables(s3, keypair(s3, origin, *actions))
    with pytest.raises(UsageError, match=r"denied to SOURCE_AWS_ACCESS_KEY_ID") as raised:
        make_plan(request_from(f"s3://{origin}/models/mine", **keys))
    assert "s3:ListBucket" in str(raised.value)
    assert "s3:GetObject" in str(raised.value)
    assert keys["SOURCE_AWS_SECRET_ACCESS_KEY"] not in str(raised.value)


def test_keypair_that_may_list_but_not_read(
    request_from: Callable[..., Request], s3: EmbeddedS3, origin: str
) -> None:
    keys = source_variables(s3, keypair(s3, origin, "s3:ListBucket"))
    with pytest.raises(UsageError, match=r"models/mine/model_index\.json: access was denied"):
        make_plan(request_from(f"s3://{origin}/models/mine", **keys))


def test_published_model_that_may_be_listed_but_not_read(
    request_from: Callable[..., Request], s3: EmbeddedS3, origin: str, admin: Any
) -> None:
    admin.put_object(Bucket=origin, Key="models/mine/latest.json", Body=b"{}")
    keys = source_variables(s3, keypair(s3, origin, "s3:ListBucket"))
    with pytest.raises(UsageError, match=r"models/mine/latest\.json: access was denied"):
        make_plan(request_from(f"s3://{origin}/models/mine", **keys))


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("SOURCE_AWS_SECRET_ACCESS_KEY", "mistyped", "SignatureDoesNotMatch"),
        ("SOURCE_AWS_ACCESS_KEY_ID", "AKIAUNKNOWN", "InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_named_and_not_shown(
    request_from: Callable[..., Request],
    s3: EmbeddedS3,
    origin: str,
    name: str,
    value: str,
    code: str,
) -> None:
    keys = {**source_variables(s3, s3.admin), name: value}
    with pytest.raises(UsageError, match=r"does not accept SOURCE_AWS_ACCESS_KEY_ID") as raised:
        make_plan(request_from(f"s3://{origin}/models/mine", **keys))
    assert code in str(raised.value)
    assert value not in str(raised.value)


def test_keys_that_are_the_publishers_are_named_as_such(
    request_from: Callable[..., Request], origin: str
) -> None:
    with pytest.raises(UsageError, match=r"does not accept AWS_ACCESS_KEY_ID") as raised:
        make_plan(request_from(f"s3://{origin}/models/mine", AWS_SECRET_ACCESS_KEY="mistyped"))
    assert "Set SOURCE_AWS_ACCESS_KEY_ID and SOURCE_AWS_SECRET_ACCESS_KEY" in str(raised.value)


def test_server_that_cannot_be_reached_is_named_by_its_variable(
    request_from: Callable[..., Request],
) -> None:
    with LoopbackHub() as gone:
        url = gone.url
    request = request_from("s3://models/mine", SOURCE_AWS_ENDPOINT_URL_S3=url)
    with pytest.raises(PreparationError, match=r"could not be reached. Check SOURCE_AWS_END") as e:
        make_plan(request)
    assert exit_code(e.value) == 1


def test_folder_that_is_not_there_shows_what_is(
    request_from: Callable[..., Request], origin: str
) -> None:
    with pytest.raises(UsageError, match=rf"nothing under s3://{origin}/model/\. .*models/mine/"):
        make_plan(request_from(f"s3://{origin}/model"))


def test_folder_above_the_model_names_the_one_to_give(
    request_from: Callable[..., Request], origin: str
) -> None:
    with pytest.raises(UsageError, match=r"no model_index\.json.*one in mine: give that folder"):
        make_plan(request_from(f"s3://{origin}/models"))


def test_folder_of_something_else_shows_what_it_holds(
    request_from: Callable[..., Request], origin: str, admin: Any
) -> None:
    for name in ("notes.txt", "images/1.png", "images/2.png"):
        admin.put_object(Bucket=origin, Key=f"other/{name}", Body=b"-")
    with pytest.raises(UsageError, match=r"no model_index\.json.*It holds images, notes\.txt\."):
        make_plan(request_from(f"s3://{origin}/other"))


@pytest.mark.parametrize("name", ["unet/../../x", "unet//x", "unet\\x", "unet/x\ty", "./x"])
def test_key_that_would_leave_its_folder_is_refused(
    request_from: Callable[..., Request],
    origin: str,
    admin: Any,
    name: str,
    tmp_path: Path,
) -> None:
    admin.put_object(Bucket=origin, Key=f"models/mine/{name}", Body=b"-")
    with pytest.raises(UsageError, match=r"would lead out of the folder .* Remove or rename"):
        make_plan(request_from(f"s3://{origin}/models/mine"))
    assert not (tmp_path / "prepared").exists()


def test_full_disk_is_found_out_before_the_download(
    request_from: Callable[..., Request],
    s3: EmbeddedS3,
    origin: str,
    monkeypatch: pytest.MonkeyPatch,
    quiet: Progress,
) -> None:
    # given a disk that reports a megabyte free (a real full disk would need root)
    monkeypatch.setattr("preparation.assemble.shutil.disk_usage", lambda _place: _Usage(10**6))
    request = request_from(f"s3://{origin}/models/mine")
    with pytest.raises(PreparationError, match=r"has 1 MB free.*--destdir .*from a bucket"):
        prepare(request, make_plan(request), quiet)
    assert not any(
        found.range and found.key.endswith(".safetensors") for found in s3.requests(origin)
    )


def test_disk_that_fills_up_meanwhile_is_named_and_what_arrived_is_kept(
    request_from: Callable[..., Request],
    origin: str,
    monkeypatch: pytest.MonkeyPatch,
    quiet: Progress,
    tmp_path: Path,
    s3: EmbeddedS3,
) -> None:
    # given a disk that takes so much and no more (a real full disk would need root)
    request = replace(request_from(f"s3://{origin}/models/mine"), jobs=1)
    plan = make_plan(request)
    write, room = os.pwrite, [3_000_000]

    def limited(descriptor: int, data: memoryview, position: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        with pytest.raises(PreparationError, match=r"No space left on device.*--destdir"):
            prepare(request, plan, quiet)
    assert not (tmp_path / "prepared/me--model").exists()
    # when there is room again, then
    s3.forget_requests()
    prepare(request, make_plan(request), quiet)
    read = [found.key for found in s3.requests(origin) if found.key.endswith(".safetensors")]
    assert len(read) == 2  # the UNet, which did not fit, and what comes after it


def test_server_that_fails_for_a_moment_is_asked_again(
    request_from: Callable[..., Request],
    s3: EmbeddedS3,
    origin: str,
    models: Models,
    quiet: Progress,
) -> None:
    s3.inject(Fault("status", bucket=origin, key="*/unet/*.safetensors", status=503, times=1))
    s3.inject(Fault("truncate", bucket=origin, key="*/vae/*.safetensors", at=100_000, times=1))
    request = request_from(f"s3://{origin}/models/mine")
    try:
        folder = prepare(request, make_plan(request), quiet).folder
    finally:
        s3.clear_faults()
    for path, content in files_of(models.half).items():
        if path.endswith(".safetensors"):
            assert (folder / path).read_bytes() == content


def test_nothing_is_published_of_a_source_that_fails(
    command: Callable[..., Ran], origin: str, bucket: Bucket, admin: Any
) -> None:
    # given a folder that is complete but for one component's weights
    key = "models/mine/vae/diffusion_pytorch_model.safetensors"
    admin.delete_object(Bucket=origin, Key=key)
    ran = command(f"s3://{origin}/models/mine", bucket.name, "--name", "me/model")
    assert ran.code == 2
    assert f"s3://{origin}/models/mine has no safetensors weights for vae" in ran.err
    assert list(bucket.list("")) == []


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free
