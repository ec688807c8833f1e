"""Publishing is atomic, sends only what is missing, mends what is broken, and refuses what must not be served."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from botocore.stub import Stubber

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, RECIPE, publish_folder, write_model
from weights import (
    BucketError,
    FolderError,
    ModelNotFoundError,
    activate,
    find_snapshot,
    plan_publication,
    publish,
    read_latest,
)
from weights.listing import list_versions
from weights.pull import verify
from weights.remembered import Remembered
from weights.upload import PART_SIZE, is_there

UNET = "unet/diffusion_pytorch_model.safetensors"


def writes(s3: EmbeddedS3, name: str) -> list[str]:
    """The keys of the objects that requests changed, in order; parts of an upload count as their object once."""
    keys = [
        record.key
        for record in s3.requests(name)
        if record.method in ("PUT", "POST", "DELETE") and record.key
    ]
    return list(dict.fromkeys(keys))


def test_files_are_written_before_the_manifest_and_latest_last(s3, bucket, model):
    publication = publish_folder(bucket, model)

    written = writes(s3, bucket.name)

    assert written[-2:] == [publication.key("manifest.json"), f"{MODEL}/latest.json"]
    assert set(written[:-2]) == {publication.key(entry.path) for entry in publication.files}
    assert read_latest(bucket, MODEL) == publication.version


def test_publishing_the_same_folder_again_sends_nothing(s3, bucket, model):
    publish_folder(bucket, model)
    s3.forget_requests()

    again = plan_publication(model, bucket, MODEL, RECIPE)
    publish(again)

    assert again.unchanged
    assert writes(s3, bucket.name) == []


def test_what_is_served_is_looked_at_once_and_while_files_are_being_hashed(s3, bucket, model):
    files = publish_folder(bucket, model).files
    s3.forget_requests()
    looks = []

    def count(_size):
        looks.append(sum(record.method == "HEAD" for record in s3.requests(bucket.name)))

    plan_publication(model, bucket, MODEL, RECIPE, jobs=1, on_bytes=count)
    count(0)

    assert looks[-2:] == [len(files) - 1, len(files)]


def test_publishing_after_one_file_changed_sends_that_file(s3, bucket, own_model):
    first = publish_folder(bucket, own_model)
    (own_model / "vae" / "config.json").write_text('{"_class_name": "Other"}')
    s3.forget_requests()

    second = publish_folder(bucket, own_model)

    assert [entry.path for entry in second.uploads] == ["vae/config.json"]
    sent = [record for record in s3.requests(bucket.name) if record.request_bytes > 10_000]
    assert sent == []
    assert second.version != first.version
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()
    assert verify(bucket, find_snapshot(bucket, MODEL, first.version)).problems == ()


def test_progress_counts_every_byte_hashed_and_sent(bucket, large_model):
    hashed, sent = [], []

    publication = plan_publication(large_model, bucket, MODEL, RECIPE, on_bytes=hashed.append)
    publish(publication, on_bytes=sent.append)

    assert sum(hashed) == sum(sent) == publication.total_bytes == publication.upload_bytes


def test_a_failed_publication_leaves_readers_the_old_version_and_no_half_upload(
    s3, bucket, large_model
):
    old = publish_folder(bucket, large_model)
    (large_model / UNET).write_bytes((large_model / UNET).read_bytes()[:-1] + b"x")
    # The first part arrives; the others are refused.
    refusal = Fault(
        kind="status", status=403, method="PUT", bucket=bucket.name, key=f"*/{UNET}", skip=1
    )
    with s3.fault(refusal), pytest.raises(BucketError, match=UNET):
        publish_folder(bucket, large_model)

    assert read_latest(bucket, MODEL) == old.version
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.name)
    assert uploads.get("Uploads", []) == []


def test_an_interrupted_publication_goes_on_where_it_stopped(s3, bucket, model):
    refusal = Fault(
        kind="status", status=403, method="PUT", bucket=bucket.name, key="*/manifest.json"
    )
    with s3.fault(refusal), pytest.raises(BucketError):
        publish_folder(bucket, model)
    s3.forget_requests()

    publication = publish_folder(bucket, model)

    assert publication.uploads == ()
    assert writes(s3, bucket.name) == [publication.key("manifest.json"), f"{MODEL}/latest.json"]


def test_a_busy_server_is_tried_again(s3, bucket, model):
    busy = Fault(kind="status", status=503, method="PUT", bucket=bucket.name, times=2)
    with s3.fault(busy):
        publish_folder(bucket, model)

    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_publishing_again_mends_an_object_that_was_truncated(bucket, model, published):
    bucket.client.put_object(Bucket=bucket.name, Key=published.key(UNET), Body=b"short")

    mending = plan_publication(model, bucket, MODEL, RECIPE)
    publish(mending)

    assert [entry.path for entry in mending.uploads] == [UNET]
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_file_that_changes_after_hashing_is_not_published(s3, bucket, tmp_path, chunks, is_known):
    """Sent whole or in parts, whether the parts' own digests were made along with the file's or not."""
    folder = write_model(tmp_path / "folder", chunks=chunks)
    publication = plan_publication(folder, bucket, MODEL, RECIPE)
    if not is_known:
        publication = replace(publication, part_digests={})
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1] + b"x")
    s3.forget_requests()

    with pytest.raises(FolderError, match="changed while it was being published"):
        publish(publication, jobs=1)

    assert read_latest(bucket, MODEL) is None
    assert bucket.size(publication.key(UNET)) is None
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)
    broken_off = [record for record in s3.requests(bucket.name) if record.status == 400]
    assert len(broken_off) <= 1  # trying again would not help


@pytest.fixture
def signed(bucket):
    """The SHA-256s that requests were signed with, by key and part: 1 where it was the whole object."""
    found = {}

    def note(request, **_):
        url = urlsplit(request.url)
        number = int(dict(parse_qsl(url.query)).get("partNumber", 1))
        key = unquote(url.path).removeprefix(f"/{bucket.name}/")
        found[key, number] = request.headers["X-Amz-Content-SHA256"].decode()

    bucket.client.meta.events.register("before-send.s3.PutObject", note)
    bucket.client.meta.events.register("before-send.s3.UploadPart", note)
    return found


@pytest.mark.parametrize("is_known", [True, False])
def test_what_is_sent_is_signed_with_its_own_sha256(bucket, large_model, signed, is_known):
    publication = plan_publication(large_model, bucket, MODEL, RECIPE)
    publish(publication if is_known else replace(publication, part_digests={}))

    for entry in publication.files:
        data = (large_model / entry.path).read_bytes()
        for number in range(1, -(-len(data) // PART_SIZE) + 1):
            part = data[(number - 1) * PART_SIZE : number * PART_SIZE]
            digest = signed.pop((publication.key(entry.path), number))
            assert digest == hashlib.sha256(part).hexdigest()
    assert set(signed) == {(publication.key("manifest.json"), 1), (f"{MODEL}/latest.json", 1)}


def test_a_part_whose_sha256_is_known_is_not_read_once_more_to_sign_it(bucket, large_model, signed):
    publication = plan_publication(large_model, bucket, MODEL, RECIPE)
    assert len(publication.part_digests[UNET]) == 3

    publish(replace(publication, part_digests={UNET: ["0" * 64, "1" * 64, "2" * 64]}))

    assert [signed[publication.key(UNET), number][0] for number in (1, 2, 3)] == ["0", "1", "2"]


def test_only_what_the_served_version_lacks_is_hashed_in_full(bucket, own_model):
    """A file that has its BLAKE3s is that file. To repair, all are read for themselves."""
    first = publish_folder(bucket, own_model)
    (own_model / "vae" / "config.json").write_text(
        '{"_class_name": "Somewhere"}'
    )  # of the same size

    second = plan_publication(own_model, bucket, MODEL, RECIPE)
    repair = plan_publication(own_model, bucket, MODEL, RECIPE, repair=True)

    assert set(second.part_digests) == {"vae/config.json"}
    assert set(repair.part_digests) == {entry.path for entry in first.files}
    assert second.manifest == repair.manifest


def test_what_is_taken_from_the_served_manifest_is_remembered(bucket, own_model, tmp_path):
    publish_folder(bucket, own_model)
    remembered = Remembered(tmp_path / "digests.json")

    plan_publication(own_model, bucket, MODEL, RECIPE, remembered=remembered)

    assert remembered.recall(UNET, (own_model / UNET).stat()) is not None


def test_a_bucket_that_is_not_there_is_found_before_anything_is_hashed(bucket_for, model):
    hashed = []

    with pytest.raises(BucketError, match="does not exist"):
        plan_publication(model, bucket_for("no-such-bucket"), MODEL, RECIPE, on_bytes=hashed.append)

    assert hashed == []


@pytest.mark.parametrize("name", ["unet/model.bin", "old.ckpt"])
def test_a_folder_with_a_pickle_is_refused(bucket, own_model, name):
    (own_model / name).write_bytes(b"\x80\x04")
    with pytest.raises(FolderError, match=f"{name}: it may hold a pickle"):
        plan_publication(own_model, bucket, MODEL, RECIPE)


def test_a_link_out_of_the_folder_is_refused(bucket, own_model):
    (own_model / "passwords.txt").symlink_to("/etc/passwd")
    with pytest.raises(FolderError, match=r"passwords\.txt: it is a link to /etc/passwd"):
        plan_publication(own_model, bucket, MODEL, RECIPE)


def test_a_link_to_a_hidden_file_is_refused(bucket, own_model):
    (own_model / ".env").write_text("secret")
    (own_model / "notes.txt").symlink_to(own_model / ".env")
    with pytest.raises(FolderError, match=r"notes\.txt: it is a link to .*\.env, which is hidden"):
        plan_publication(own_model, bucket, MODEL, RECIPE)


def test_a_linked_folder_is_refused_and_not_left_out_silently(bucket, own_model, tmp_path):
    (own_model / "vae").rename(tmp_path / "elsewhere")
    (own_model / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="vae: it is a link to a folder"):
        plan_publication(own_model, bucket, MODEL, RECIPE)


def test_hidden_files_stay_at_home(bucket, own_model):
    (own_model / ".git").mkdir()
    (own_model / ".git" / "config").write_text("secret")
    (own_model / ".env").write_text("secret")
    paths = [entry.path for entry in plan_publication(own_model, bucket, MODEL, RECIPE).files]
    assert not any(path.startswith(".") for path in paths)


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_missing_or_empty_folder_is_refused(bucket, tmp_path, prepare):
    prepare(tmp_path / "nothing")
    with pytest.raises(FolderError, match="nothing"):
        plan_publication(tmp_path / "nothing", bucket, MODEL, RECIPE)


def test_every_object_tells_its_sha256_to_other_tools(bucket, published):
    for entry in published.files:
        head = bucket.client.head_object(Bucket=bucket.name, Key=published.key(entry.path))
        assert head["Metadata"]["sha256"] == entry.sha256


@pytest.mark.parametrize("broken", [b"nonsense", b"x" * 100_000])
def test_publishing_again_mends_a_broken_latest(bucket, model, published, broken):
    bucket.client.put_object(Bucket=bucket.name, Key=f"{MODEL}/latest.json", Body=broken)
    publish_folder(bucket, model)
    assert read_latest(bucket, MODEL) == published.version


def test_versions_can_be_listed_when_latest_is_broken(bucket, published):
    bucket.client.put_object(Bucket=bucket.name, Key=f"{MODEL}/latest.json", Body=b"nonsense")
    (found,) = list_versions(bucket, MODEL)
    assert found.version == published.version
    assert not found.active


def test_repairing_sends_also_what_only_looks_right(bucket, model, published):
    key = published.key(UNET)
    head = bucket.client.head_object(Bucket=bucket.name, Key=key)
    damaged = bytearray((model / UNET).read_bytes())
    damaged[-1] ^= 1
    bucket.client.put_object(
        Bucket=bucket.name, Key=key, Body=bytes(damaged), Metadata=head["Metadata"]
    )
    assert plan_publication(model, bucket, MODEL, RECIPE).unchanged

    publish(plan_publication(model, bucket, MODEL, RECIPE, repair=True))

    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_file_too_large_to_copy_at_once_is_copied_in_parts(bucket, large_model, monkeypatch):
    monkeypatch.setattr("weights.upload._COPY_IN_ONE", 32 * 1024 * 1024)  # S3's is 5 GiB
    publish_folder(bucket, large_model)
    (large_model / "vae" / "config.json").write_text('{"_class_name": "Other"}')

    second = publish_folder(bucket, large_model)

    assert UNET not in {entry.path for entry in second.uploads}
    head = bucket.client.head_object(Bucket=bucket.name, Key=second.key(UNET))
    assert head["ETag"].strip('"').endswith("-9")  # 66 MiB in parts of 8
    assert head["Metadata"].keys() == {"sha256"}
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_metadata_names_that_a_server_capitalises_are_recognised(bucket, published):
    # Servers written in Go answer X-Amz-Meta-Sha256; botocore hands the name on as it came.
    entry = published.files[0]
    with Stubber(bucket.client) as server:
        server.add_response(
            "head_object", {"ContentLength": entry.size, "Metadata": {"Sha256": entry.sha256}}
        )
        assert is_there(bucket, published.key(entry.path), entry)


def test_activate_goes_back_to_an_earlier_version(bucket, own_model):
    first = publish_folder(bucket, own_model)
    publish_folder(bucket, own_model, RECIPE | {"steps": [8]})

    activate(bucket, MODEL, first.version)

    assert find_snapshot(bucket, MODEL).version == first.version


def test_activate_refuses_a_version_that_is_not_there(bucket, published):
    with pytest.raises(ModelNotFoundError, match="0" * 32):
        activate(bucket, MODEL, "0" * 32)
    assert read_latest(bucket, MODEL) == published.version
