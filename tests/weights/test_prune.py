"""Pruning deletes old versions whole, each one's manifest first, and never what is served."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, RECIPE, publish_folder
from weights import (
    BucketError,
    ManifestError,
    ModelNotFoundError,
    activate,
    find_snapshot,
    plan_publication,
    publish,
)
from weights.bucket import ObjectInfo
from weights.listing import list_versions
from weights.prune import StoredVersion, choose, plan_pruning, prune
from weights.pull import verify

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def stored(version: str, hours: float, *, published: bool = True) -> StoredVersion:
    """A version that was written so many hours ago."""
    at = NOW - timedelta(hours=hours)
    info = ObjectInfo(f"{MODEL}/{version}/x", 10, "etag", at)
    return StoredVersion(version, (info,), at if published else None)


def chosen(versions, keep, active="", also=()):
    kept, deleted = choose(versions, keep, active, NOW, also=also)
    return list(kept), [found.version for found in deleted]


def test_the_newest_stay_and_the_oldest_go_first():
    versions = [stored("b", 2), stored("d", 4), stored("a", 1), stored("c", 3)]
    assert chosen(versions, 2) == (["a", "b"], ["d", "c"])


def test_the_active_one_stays_however_old():
    versions = [stored("a", 1), stored("b", 2), stored("c", 3)]
    assert chosen(versions, 1, active="c") == (["a", "c"], ["b"])


def test_what_has_just_been_published_stays_and_what_will_be_counts_as_the_newest():
    versions = [stored("a", 1), stored("b", 2), stored("c", 3)]
    assert chosen(versions, 1, active="a", also=["c"]) == (["a", "c"], ["b"])
    assert chosen(versions, 2, active="c", also=["new"]) == (["new", "a"], ["c", "b"])


def test_of_one_second_the_active_one_is_the_newest():
    versions = [stored("a", 1), stored("b", 1), stored("c", 1)]
    assert chosen(versions, 1, active="a") == (["a"], ["b", "c"])


def test_files_without_a_manifest_go_once_nobody_has_written_any_for_a_day():
    versions = [
        stored("a", 1),
        stored("b", 23, published=False),
        stored("c", 25, published=False),
        stored("d", 99, published=False),
    ]
    assert chosen(versions, 1, active="d") == (["a"], ["c"])


def four_versions(bucket, folder):
    return [publish_folder(bucket, folder, RECIPE | {"steps": [steps]}) for steps in (1, 2, 4, 8)]


def test_deleted_versions_leave_nothing_and_the_others_stay_whole(s3, bucket, model):
    *old, last = four_versions(bucket, model)
    s3.forget_requests()

    deleted = prune(plan_pruning(bucket, MODEL, 1))

    assert {found.version for found in deleted} == {each.version for each in old}
    assert [found.version for found in list_versions(bucket, MODEL)] == [last.version]
    assert {found.key.split("/")[2] for found in bucket.list(f"{MODEL}/")} == {
        last.version,
        "latest.json",
    }
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()
    for each in old:
        gone = [r.key for r in s3.requests(bucket.name) if r.key.startswith(each.key(""))]
        assert gone[0] == each.key("manifest.json")
        assert len(gone) == len(each.files) + 1


def test_a_version_that_becomes_active_meanwhile_stays(bucket, model):
    first, *_ = four_versions(bucket, model)
    pruning = plan_pruning(bucket, MODEL, 1)
    activate(bucket, MODEL, first.version)

    deleted = prune(pruning)

    assert len(deleted) == 2
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_pruning_that_was_cut_off_leaves_no_version_half_readable(s3, bucket, model):
    four_versions(bucket, model)
    refusal = Fault(kind="status", status=403, method="DELETE", bucket=bucket.name, skip=1)
    with s3.fault(refusal), pytest.raises(BucketError, match="cannot delete"):
        prune(plan_pruning(bucket, MODEL, 1))

    for found in list_versions(bucket, MODEL):
        assert verify(bucket, find_snapshot(bucket, MODEL, found.version)).problems == ()


def test_another_model_below_this_ones_path_is_not_touched(bucket, model):
    four_versions(bucket, model)
    below = f"{MODEL}/more"
    publish(plan_publication(model, bucket, below, RECIPE))

    prune(plan_pruning(bucket, MODEL, 1))

    assert verify(bucket, find_snapshot(bucket, below)).problems == ()


def test_without_knowing_what_is_active_nothing_is_deleted(bucket, model):
    four_versions(bucket, model)
    bucket.put(f"{MODEL}/latest.json", b"broken", content_type="application/json")
    with pytest.raises(ManifestError, match=r"latest\.json"):
        plan_pruning(bucket, MODEL, 1)


def test_a_model_that_is_not_there_is_named(bucket):
    with pytest.raises(ModelNotFoundError, match="no version of 'me/nothing'"):
        plan_pruning(bucket, "me/nothing", 1)


def command(s3, bucket, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weights", *arguments, "--bucket", bucket.name],
        env=s3.environment() | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_says_what_it_deleted(s3, bucket, model):
    *old, last = four_versions(bucket, model)

    ran = command(s3, bucket, "prune", MODEL, "--keep", "1", "--json")

    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert {found["version"] for found in document["deleted"]} == {each.version for each in old}
    assert all(found["bytes"] > 0 for found in document["deleted"])
    assert document["kept"] == [last.version]
    again = command(s3, bucket, "prune", MODEL, "--keep", "1")
    assert again.stdout == f"{MODEL}: nothing to delete, 1 kept\n"


@pytest.mark.parametrize("keep", ["0", "-1", "x"])
def test_the_command_refuses_to_keep_none(s3, bucket, keep):
    ran = command(s3, bucket, "prune", MODEL, f"--keep={keep}")
    assert ran.returncode == 2
    assert "the newest version always stays" in ran.stderr
