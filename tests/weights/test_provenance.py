"""How a version came about is told beside it, changes nothing of it, and stays as it was first written down."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.weights.conftest import MODEL, RECIPE, publish_folder
from weights import ManifestError, find_snapshot, plan_publication, publish
from weights.listing import list_versions
from weights.provenance import PROVENANCE_NAME, read_provenance
from weights.pull import pull, verify

MADE = {"options": {"revision": "v2"}, "tools": {"python": "3.11.9", "torch": "2.13.0"}}


def publish_with(bucket, folder, provenance):
    publication = plan_publication(folder, bucket, MODEL, RECIPE, provenance=provenance)
    publish(publication)
    return publication


def test_it_can_be_read_and_is_no_part_of_the_version(bucket, model, tmp_path):
    plain = plan_publication(model, bucket, MODEL, RECIPE)
    published = publish_with(bucket, model, MADE)

    assert read_provenance(bucket, MODEL, published.version) == MADE
    assert published.version == plain.version
    snapshot = find_snapshot(bucket, MODEL)
    assert verify(bucket, snapshot).problems == ()
    pull(bucket, snapshot, tmp_path)
    assert not (tmp_path / PROVENANCE_NAME).exists()


def test_publishing_the_same_again_keeps_the_first(bucket, model):
    published = publish_with(bucket, model, MADE)
    bucket.delete(published.key("manifest.json"))

    publish_with(bucket, model, {"tools": {"python": "9"}})

    assert read_provenance(bucket, MODEL, published.version) == MADE


def test_a_version_without_it_is_as_good(bucket, published):
    (found,) = list_versions(bucket, MODEL)
    assert found.provenance is None
    assert found.problem is None


@pytest.mark.parametrize("broken", [b"nonsense", b"[]", b'{"format": "2"}', b"x" * 300_000])
def test_one_that_cannot_be_read_is_none(bucket, published, broken):
    bucket.put(published.key(PROVENANCE_NAME), broken, content_type="application/json")
    assert read_provenance(bucket, MODEL, published.version) is None
    assert list_versions(bucket, MODEL)[0].problem is None


def test_what_is_no_json_is_refused_before_the_version_is_there(bucket, model):
    with pytest.raises(ManifestError, match="provenance"):
        publish_with(bucket, model, {"tools": object()})
    assert not [found for found in bucket.list("") if found.key.endswith("manifest.json")]


def test_the_list_of_versions_shows_where_each_is_from(s3, bucket, model):
    source = {"repo": "me/model", "revision": "c0ffee", "licence": "openrail++"}
    publication = plan_publication(
        model, bucket, MODEL, RECIPE | {"source": source}, provenance=MADE
    )
    publish(publication)

    def ls(*options: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "weights", "ls", MODEL, "--bucket", bucket.name, *options],
            env=s3.environment() | {"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert ls().rstrip().endswith("me/model  c0ffee  openrail++  revision=v2")
    (version,) = json.loads(ls("--json"))["versions"]
    assert version["source"] == source
    assert version["provenance"] == MADE


def test_how_a_version_differs_is_told_file_by_file(bucket, own_model):
    first = publish_folder(bucket, own_model)
    assert first.difference is None
    (own_model / "vae" / "config.json").write_text('{"_class_name": "Other"}')
    (own_model / "unet" / "config.json").rename(own_model / "unet" / "renamed.json")

    second = publish_folder(bucket, own_model, RECIPE | {"steps": [8]}).difference

    assert second is not None
    assert second.since == first.version
    assert [entry.path for entry in second.added] == ["unet/renamed.json"]
    assert [entry.path for entry in second.changed] == ["vae/config.json"]
    assert [entry.path for entry in second.removed] == ["unet/config.json"]
    assert len(second.same) == len(first.files) - 2
    assert second.recipe_changed
