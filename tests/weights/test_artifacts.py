"""Artifacts beside a version: whole and verified or not at all, replaced in one step, and gone with their version."""

from __future__ import annotations

import json

import pytest

from demo.s3_faults import Fault
from settings import load_storage_settings
from tests.weights.conftest import MODEL, RECIPE, publish_folder
from weights import Bucket, ManifestError
from weights.__main__ import main
from weights.artifacts import (
    ARTIFACTS_FOLDER,
    fetch_artifacts,
    list_artifacts,
    publish_artifacts,
    read_artifacts,
)
from weights.chunks import CHUNK_SIZE
from weights.errors import BucketError, CorruptObjectError
from weights.listing import list_versions
from weights.prune import plan_pruning, prune
from weights.transport import Patience

KEY = "Some-Card_sm90_torch-2.13.0-cu130"
BLOBS = {"cache.tar.gz": b"code" * 1000, "notes": b""}
ABOUT = {"sizes": [[1024, 1024]]}


@pytest.fixture
def version(published) -> str:
    return published.version


def publish(bucket, version, blobs=BLOBS, key=KEY):
    return publish_artifacts(bucket, MODEL, version, key, blobs, ABOUT)


def manifest_key(version: str, key: str = KEY) -> str:
    return f"{MODEL}/{version}/{ARTIFACTS_FOLDER}/{key}/manifest.json"


def blob_key(version: str, manifest) -> str:
    return f"{MODEL}/{version}/{ARTIFACTS_FOLDER}/{KEY}/{manifest.files[0].path}"


def keys_in(bucket) -> set[str]:
    return {found.key for found in bucket.list("")}


def test_what_is_published_is_fetched(bucket, version):
    publish(bucket, version)

    found = fetch_artifacts(bucket, MODEL, version, KEY)

    assert found is not None
    assert (found.blobs, found.about) == (BLOBS, ABOUT)


def test_blobs_of_several_chunks_are_verified_chunk_by_chunk(bucket, version):
    large = {"cache": bytes(range(256)) * (CHUNK_SIZE // 256) + b"and some more"}
    manifest = publish(bucket, version, large)

    found = fetch_artifacts(bucket, MODEL, version, KEY)

    assert [len(entry.chunks) for entry in manifest.files] == [2]
    assert found is not None
    assert found.blobs == large


def test_reading_takes_the_right_to_read_and_no_more(s3, bucket, bucket_for, version):
    publish(bucket, version)
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "s3:GetObject",
                "Resource": f"arn:aws:s3:::{bucket.name}/*",
            }
        ],
    }
    reader = bucket_for(bucket.name, s3.create_user(f"reader-{bucket.name}", policy))

    assert fetch_artifacts(reader, MODEL, version, KEY) is not None
    # What is not there looks forbidden to who may not list.
    assert fetch_artifacts(reader, MODEL, version, "another") is None


def test_artifacts_of_another_key_are_not_seen(bucket, version, caplog):
    publish(bucket, version, key=KEY.replace("2.13.0", "2.12.0"))

    with caplog.at_level("INFO", logger="weights"):
        assert fetch_artifacts(bucket, MODEL, version, KEY) is None

    assert caplog.messages == [f"no compiled code for {KEY}: scripts/compile_model.py publishes it"]


def test_those_of_another_key_or_version_in_this_place_are_refused(bucket, version):
    publish(bucket, version)
    document = bucket.get(manifest_key(version), limit=10**6)
    bucket.put(manifest_key(version, "other"), document, content_type="application/json")

    with pytest.raises(ManifestError, match=f"it is about {KEY} of version {version}"):
        read_artifacts(bucket, MODEL, version, "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "its digest differs"),
        (lambda data: data[:-1], "has 3999 bytes where 4000 were published"),
        (lambda data: data + b"x", "has more than the 4000 bytes"),
    ],
)
def test_damaged_bytes_are_refused_by_name(bucket, version, caplog, damage, message):
    key = blob_key(version, publish(bucket, version))
    bucket.put(key, damage(BLOBS["cache.tar.gz"]), content_type="application/octet-stream")

    assert fetch_artifacts(bucket, MODEL, version, KEY) is None

    (line,) = caplog.messages
    assert bucket.url(key) in line
    assert message in line
    assert "Run scripts/compile_model.py again" in line
    with pytest.raises(CorruptObjectError):
        read_artifacts(bucket, MODEL, version, KEY)


def test_a_manifest_without_the_digests_of_its_files_is_refused(bucket, version):
    publish(bucket, version)
    document = json.loads(bucket.get(manifest_key(version), limit=10**6))
    del document["files"][0]["sha256"]
    bucket.put(
        manifest_key(version), json.dumps(document).encode(), content_type="application/json"
    )

    with pytest.raises(ManifestError, match=r"files\.0\.sha256: Field required"):
        read_artifacts(bucket, MODEL, version, KEY)


def test_only_the_digests_that_are_allowed_are_read(s3, bucket, version, caplog):
    manifest = publish(bucket, version, {"cache.tar.gz": b"code"})
    digest = manifest.files[0].sha256

    assert fetch_artifacts(bucket, MODEL, version, KEY, only=("0" * 64, digest)) is not None
    s3.forget_requests()
    assert fetch_artifacts(bucket, MODEL, version, KEY, only=("0" * 64,)) is None

    assert f"the SHA-256 of cache.tar.gz, {digest}, is none of those allowed here" in caplog.text
    asked = [record.key for record in s3.requests(bucket.name)]
    assert asked == [manifest_key(version)]


@pytest.mark.parametrize("document", [b"{", b"[]", b'{"files": []}'])
def test_a_manifest_that_is_none_is_refused(bucket, version, caplog, document):
    bucket.put(manifest_key(version), document, content_type="application/json")

    assert fetch_artifacts(bucket, MODEL, version, KEY) is None
    assert bucket.url(manifest_key(version)) in caplog.text


def test_a_blob_that_is_gone_is_named(bucket, version):
    key = blob_key(version, publish(bucket, version))
    bucket.delete(key)

    with pytest.raises(BucketError, match=r"Its manifest is there\. Run scripts/compile_model.py"):
        read_artifacts(bucket, MODEL, version, KEY)


def test_a_server_that_fails_is_a_line_in_the_log(s3, bucket, version, caplog):
    publish(bucket, version)
    settings = load_storage_settings(s3.environment())
    impatient = Bucket(settings, bucket.name, patience=Patience(pause=0.01))

    with s3.fault(Fault(kind="status", status=500, bucket=bucket.name)):
        assert fetch_artifacts(impatient, MODEL, version, KEY) is None

    assert "compiled code is not used: cannot read" in caplog.text


def test_publishing_again_takes_over_and_leaves_what_a_reader_may_be_reading(bucket, version):
    first = publish(bucket, version)

    second = publish(bucket, version, {"cache.tar.gz": b"newer"})

    found = fetch_artifacts(bucket, MODEL, version, KEY)
    assert found is not None
    assert found.blobs == {"cache.tar.gz": b"newer"}
    assert {blob_key(version, first), blob_key(version, second)} <= keys_in(bucket)


def test_a_publication_that_fails_leaves_what_was_there(s3, bucket, version):
    publish(bucket, version)

    with (
        s3.fault(Fault(kind="status", status=403, bucket=bucket.name, method="PUT")),
        pytest.raises(BucketError),
    ):
        publish(bucket, version, {"cache.tar.gz": b"newer"})

    found = fetch_artifacts(bucket, MODEL, version, KEY)
    assert found is not None
    assert found.blobs == BLOBS


@pytest.mark.parametrize("key", ["", "a/b", ".hidden", "with space", "x" * 256])
def test_a_key_that_is_no_name_is_refused(bucket, version, key):
    with pytest.raises(ManifestError):
        publish(bucket, version, key=key)


def test_a_bare_folder_has_none(bucket):
    assert fetch_artifacts(bucket, MODEL, "bare-0123456789abcdef", KEY) is None


def test_pruning_a_version_takes_its_artifacts_along(bucket, model):
    old, new = (publish_folder(bucket, model, RECIPE | {"steps": [steps]}) for steps in (1, 2))
    for publication in (old, new):
        publish(bucket, publication.version)

    prune(plan_pruning(bucket, MODEL, keep=1))

    assert not any(old.version in key for key in keys_in(bucket))
    assert fetch_artifacts(bucket, MODEL, new.version, KEY) is not None


def test_listing_shows_them_with_their_version(bucket, version):
    publish(bucket, version)
    publish(bucket, version, key="another")

    (found,) = list_versions(bucket, MODEL)

    assert found.compiled == ("Some-Card_sm90_torch-2.13.0-cu130", "another")
    assert list(list_artifacts(bucket, MODEL, version)) == [*found.compiled]


def command(s3, bucket, monkeypatch, capsys, *arguments) -> tuple[int, str]:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    status = main([*arguments, "--bucket", bucket.name])
    return status, capsys.readouterr().out


def test_verify_reads_them_too(s3, bucket, version, monkeypatch, capsys):
    key = blob_key(version, publish(bucket, version))
    whole = command(s3, bucket, monkeypatch, capsys, "verify", MODEL)
    bucket.put(key, b"other", content_type="application/octet-stream")
    spoilt = command(s3, bucket, monkeypatch, capsys, "verify", MODEL)

    assert whole[0] == 0
    assert (
        "and compiled code for 1 kind(s) of machine: every byte is what was published" in whole[1]
    )
    assert spoilt[0] == 1
    assert f"{bucket.url(key)} has 5 bytes where 4000 were published" in spoilt[1]
    assert "the model is what was published, its compiled code is not (1 of 1)" in spoilt[1]
