"""`pull` leaves a whole folder or no file under a wrong name; `verify` reads every byte and names what is wrong."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, publish_folder
from weights import BucketError, CorruptObjectError, FolderError, WeightsError, find_snapshot
from weights.pull import pull, verify

UNET = "unet/diffusion_pytorch_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def flip(bucket, key: str, position: int) -> None:
    data = bytearray(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    data[position] ^= 0xFF
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=bytes(data))


def test_a_pulled_folder_is_the_published_one_and_its_manifest(bucket, model, published, tmp_path):
    pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")

    pulled = contents(tmp_path / "out")
    assert pulled.pop("manifest.json")
    assert pulled.pop(".pulled.json")
    assert pulled == contents(model)


def test_pulling_again_reads_only_what_is_missing_or_damaged(
    s3, bucket, model, published, tmp_path
):
    snapshot = find_snapshot(bucket, MODEL)
    pull(bucket, snapshot, tmp_path)
    (tmp_path / "model_index.json").write_text("damaged")
    s3.forget_requests()

    pull(bucket, snapshot, tmp_path)

    asked = {record.key for record in s3.requests(bucket.name)}
    assert asked == {published.key("model_index.json")}
    assert (tmp_path / "model_index.json").read_bytes() == (model / "model_index.json").read_bytes()


def test_a_corrupt_object_leaves_no_file_and_no_manifest(bucket, published, tmp_path):
    flip(bucket, published.key(UNET), 1000)

    with pytest.raises(CorruptObjectError, match=UNET):
        pull(bucket, find_snapshot(bucket, MODEL), tmp_path)

    left = contents(tmp_path)
    assert UNET not in left
    assert "manifest.json" not in left
    assert not any(path.endswith(".part") for path in left)


def pulling(s3, bucket, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "weights",
            "pull",
            MODEL,
            "--to",
            str(folder),
            "--bucket",
            bucket.name,
        ],
        env=s3.environment() | {"PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_that_pull_into_one_folder_do_not_spoil_each_others_files(
    s3, bucket, model, published, tmp_path
):
    held = Fault(kind="hold", bucket=bucket.name, key=f"*/{UNET}", skip=1, times=1)
    s3.inject(held)
    first = pulling(s3, bucket, tmp_path / "out")
    try:
        s3.wait_for_held_request()
        second = pulling(s3, bucket, tmp_path / "out")
        assert second.wait(60) == 0
    finally:
        s3.clear_faults()
    assert first.wait(60) == 0

    pulled = contents(tmp_path / "out")
    assert pulled.pop("manifest.json")
    assert pulled.pop(".pulled.json")
    assert pulled == contents(model)


def test_an_interrupt_ends_at_once_although_the_server_says_nothing(
    s3, bucket, published, tmp_path
):
    s3.inject(Fault(kind="hold", bucket=bucket.name, key=f"*/{UNET}"))
    child = pulling(s3, bucket, tmp_path / "out")
    try:
        s3.wait_for_held_request()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    finally:
        s3.clear_faults()

    assert child.returncode == 130
    assert said.strip() == "interrupted; nothing was left half done"
    assert UNET not in contents(tmp_path / "out")
    assert not any(path.endswith(".part") for path in contents(tmp_path / "out"))


def test_a_link_that_leads_out_of_the_folder_is_not_followed(bucket, published, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").symlink_to(victim)
    with pytest.raises(FolderError, match=r"is a link to .*victim, outside the folder"):
        pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")
    assert contents(victim) == {}


@pytest.mark.parametrize("place", ["out", "out/unet"])
def test_a_file_where_a_folder_must_go_is_named(bucket, published, tmp_path, place):
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("in the way")
    with pytest.raises(FolderError, match=f"cannot write {tmp_path / place}"):
        pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")
    assert file.read_text() == "in the way"


def test_pulling_another_version_leaves_nothing_of_the_one_before(bucket, own_model, tmp_path):
    publish_folder(bucket, own_model)
    pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")
    (own_model / UNET).rename(own_model / "unet" / "other.safetensors")
    publish_folder(bucket, own_model)

    pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")

    pulled = contents(tmp_path / "out")
    assert pulled.pop("manifest.json")
    assert pulled.pop(".pulled.json")
    assert pulled == contents(own_model)


def test_too_little_space_is_said_before_anything_is_written(
    bucket, published, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)

    with pytest.raises(FolderError, match=r"are needed and 0\.00 GB are free"):
        pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")

    assert contents(tmp_path / "out") == {}


def test_a_disk_that_refuses_midway_leaves_no_half_file(s3, bucket, published, tmp_path):
    def no_large_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "weights",
            "pull",
            MODEL,
            "--to",
            str(tmp_path / "out"),
            "--bucket",
            bucket.name,
        ],
        check=False,
        env=s3.environment() | {"PATH": "/usr/bin:/bin"},
        preexec_fn=no_large_files,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 1
    assert f"cannot write {tmp_path / 'out' / UNET}" in result.stderr
    assert "Traceback" not in result.stderr
    left = contents(tmp_path / "out")
    assert UNET not in left
    assert not any(path.endswith(".part") for path in left)


def test_verify_reads_every_byte_of_a_whole_version(bucket, published):
    read = []
    report = verify(bucket, find_snapshot(bucket, MODEL), on_bytes=read.append)
    assert report.problems == ()
    assert report.bytes_read == sum(read) == published.total_bytes


def test_verify_names_every_object_that_is_wrong(bucket, published):
    flip(bucket, published.key(UNET), 5)
    flip(bucket, published.key("vae/config.json"), 0)
    bucket.client.delete_object(Bucket=bucket.name, Key=published.key("unet/config.json"))

    problems = verify(bucket, find_snapshot(bucket, MODEL)).problems

    assert len(problems) == 3
    for path in (UNET, "vae/config.json", "unet/config.json"):
        assert any(published.key(path) in problem for problem in problems)


def test_verify_looks_at_empty_files_too(bucket, own_model):
    (own_model / "empty.txt").write_bytes(b"")
    published = publish_folder(bucket, own_model)
    bucket.client.put_object(Bucket=bucket.name, Key=published.key("empty.txt"), Body=b"grown")
    (problem,) = verify(bucket, find_snapshot(bucket, MODEL)).problems
    assert published.key("empty.txt") in problem


def test_verify_does_not_call_a_refusal_damage(s3, bucket, published):
    refusal = Fault(kind="status", status=403, bucket=bucket.name, key=f"*/{UNET}")
    snapshot = find_snapshot(bucket, MODEL)
    with s3.fault(refusal), pytest.raises(BucketError, match="may not do that"):
        verify(bucket, snapshot)


def test_a_bare_folder_cannot_be_verified(bucket, model):
    for file in model.rglob("*"):
        if file.is_file():
            bucket.client.upload_file(
                str(file), bucket.name, f"{MODEL}/{file.relative_to(model).as_posix()}"
            )
    with pytest.raises(WeightsError, match="nothing to verify it against"):
        verify(bucket, find_snapshot(bucket, MODEL))
