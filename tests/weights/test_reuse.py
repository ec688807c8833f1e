"""What any version of a model holds already is copied inside the bucket, and what has been hashed is remembered."""

from __future__ import annotations

import logging
import os

import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, RECIPE, publish_folder
from tests.weights.test_publish import UNET
from weights import BucketError, activate, find_snapshot, plan_publication, publish
from weights.prune import plan_pruning, prune
from weights.pull import verify
from weights.remembered import Remembered


def sent_bytes(s3: EmbeddedS3, name: str) -> int:
    return sum(record.request_bytes for record in s3.requests(name) if record.method == "PUT")


def copied_paths(publication) -> set[str]:
    return {entry.path for entry, _ in publication.copies}


def three_versions(bucket, folder):
    """The first one's weights come back in the third, after a second one without them was active."""
    config = folder / "vae" / "config.json"
    publish_folder(bucket, folder)
    weights = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(weights[:-1] + b"x")
    publish_folder(bucket, folder)
    (folder / UNET).write_bytes(weights)
    config.write_text('{"_class_name": "Third"}')


def test_weights_of_a_version_that_is_no_longer_active_are_not_sent_again(s3, bucket, own_model):
    three_versions(bucket, own_model)
    s3.forget_requests()

    third = publish_folder(bucket, own_model)

    assert UNET in copied_paths(third)
    assert sent_bytes(s3, bucket.name) < 10_000
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_without_the_right_to_list_only_the_active_version_is_reused(
    s3, bucket, bucket_for, own_model, caplog
):
    three_versions(bucket, own_model)
    resource = f"arn:aws:s3:::{bucket.name}/*"
    actions = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"]
    writer = s3.create_user(
        f"writer-of-{bucket.name}",
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": actions, "Resource": resource}],
        },
    )
    limited = bucket_for(bucket.name, writer)

    with caplog.at_level(logging.WARNING):
        publication = publish_folder(limited, own_model)

    assert [entry.path for entry in publication.uploads] == [UNET, "vae/config.json"]
    assert "unet/config.json" in copied_paths(publication)
    assert "may not do that" in caplog.text
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_version_with_a_broken_manifest_hinders_nobody(bucket, own_model, caplog):
    first = publish_folder(bucket, own_model)
    (own_model / "vae" / "config.json").write_text('{"_class_name": "Second"}')
    publish_folder(bucket, own_model)
    bucket.put(first.key("manifest.json"), b"nonsense", content_type="application/json")
    (own_model / "vae" / "config.json").write_text('{"_class_name": "Third"}')

    third = publish_folder(bucket, own_model)

    assert [entry.path for entry in third.uploads] == ["vae/config.json"]
    assert f"without reuse of version {first.version}" in caplog.text


def test_what_a_manifest_promises_and_the_bucket_lacks_is_sent(bucket, own_model):
    first = publish_folder(bucket, own_model)
    bucket.delete(first.key(UNET))

    second = publish_folder(bucket, own_model, RECIPE | {"steps": [8]})

    assert [entry.path for entry in second.uploads] == [UNET]
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_source_that_is_pruned_before_it_is_copied_is_sent_instead(bucket, own_model):
    first = publish_folder(bucket, own_model)
    other = publish_folder(bucket, own_model, RECIPE | {"steps": [2]})
    (own_model / "vae" / "config.json").write_text('{"_class_name": "Third"}')
    activate(bucket, MODEL, first.version)
    third = plan_publication(own_model, bucket, MODEL, RECIPE)
    activate(bucket, MODEL, other.version)
    prune(plan_pruning(bucket, MODEL, 1))
    activate(bucket, MODEL, other.version)
    assert {source.split("/")[2] for _, source in third.copies} == {first.version}

    with pytest.raises(Exception, match=other.version):  # that it was overtaken is true
        publish(third)

    snapshot = find_snapshot(bucket, MODEL, third.version)
    assert verify(bucket, snapshot).problems == ()


def test_a_copy_that_the_server_refuses_is_a_failure(s3, bucket, own_model):
    publish_folder(bucket, own_model)
    fault = Fault(kind="status", status=400, method="PUT", bucket=bucket.name, key=f"*/{UNET}")

    with s3.fault(fault), pytest.raises(BucketError, match="cannot copy"):
        publish_folder(bucket, own_model, RECIPE | {"steps": [8]})


def remembered_plan(bucket, folder, file, **options):
    hashed = []
    remembered = Remembered(file)
    publication = plan_publication(
        folder, bucket, MODEL, RECIPE, remembered=remembered, on_bytes=hashed.append, **options
    )
    assert sum(hashed) == publication.total_bytes
    return publication, max(hashed)


def test_an_untouched_folder_is_not_hashed_again(bucket, large_model, tmp_path):
    first, _ = remembered_plan(bucket, large_model, tmp_path / "digests.json")

    again, step = remembered_plan(bucket, large_model, tmp_path / "digests.json")

    assert again.manifest == first.manifest
    assert step == (large_model / UNET).stat().st_size  # not chunk by chunk


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_was_touched_is_hashed_again(bucket, own_model, tmp_path, keeps_time):
    first, _ = remembered_plan(bucket, own_model, tmp_path / "digests.json")
    status = (own_model / UNET).stat()
    (own_model / UNET).write_bytes((own_model / UNET).read_bytes()[:-1] + b"x")
    if keeps_time:
        os.utime(own_model / UNET, ns=(status.st_atime_ns, status.st_mtime_ns))

    again, _ = remembered_plan(bucket, own_model, tmp_path / "digests.json")

    assert again.version != first.version


def test_a_file_is_known_under_another_name_too_once_it_is_said_to_be_linked(own_model, tmp_path):
    remembered = Remembered(tmp_path / "digests.json")
    found = remembered.read(own_model / UNET)
    link = tmp_path / "link"
    link.hardlink_to(own_model / UNET)
    assert remembered.recall("other/name", link.stat()) is None  # one of its times has changed

    remembered.linked([link.stat()])

    known = Remembered(tmp_path / "digests.json").recall("other/name", link.stat())
    assert known == found.model_copy(update={"path": "other/name"})


def test_a_file_that_was_written_to_meanwhile_is_not_known_by_its_link(own_model, tmp_path):
    remembered = Remembered(tmp_path / "digests.json")
    remembered.read(own_model / UNET)
    (own_model / UNET).write_bytes((own_model / UNET).read_bytes()[:-1] + b"x")
    link = tmp_path / "link"
    link.hardlink_to(own_model / UNET)
    copy = tmp_path / "copy"
    copy.write_bytes(link.read_bytes())

    remembered.linked([link.stat(), copy.stat()])

    assert remembered.recall(UNET, link.stat()) is None
    assert remembered.recall(UNET, copy.stat()) is None


def test_of_very_many_files_the_oldest_are_forgotten(own_model, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.remembered._MOST", 1)
    remembered = Remembered(tmp_path / "digests.json")
    other = tmp_path / "other"
    other.write_bytes(bytes(2_000_000))
    remembered.read(other)
    remembered.read(own_model / UNET)

    assert remembered.recall("other", other.stat()) is None
    assert remembered.recall(UNET, (own_model / UNET).stat()) is not None


def test_repairing_hashes_what_is_remembered_too(bucket, own_model, tmp_path):
    remembered_plan(bucket, own_model, tmp_path / "digests.json")

    _, step = remembered_plan(bucket, own_model, tmp_path / "digests.json", repair=True)

    assert step < (own_model / UNET).stat().st_size


@pytest.mark.parametrize("kept", [b"", b"[]", b'{"format": "other"}', b"\xff"])
def test_a_memory_that_cannot_be_read_is_none(bucket, own_model, tmp_path, kept):
    (tmp_path / "digests.json").write_bytes(kept)

    publication, _ = remembered_plan(bucket, own_model, tmp_path / "digests.json")

    assert publication.uploads
