"""From a source to a bucket: what is sent, what is not sent again, and what anyone can do with the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from demo.s3 import EmbeddedS3
from preparation import Progress, Request, compare, make_plan, prepare, upload
from preparation.assemble import digests_of
from preparation.hub import Hub
from settings import load_source_settings
from tests.preparation.conftest import BASE, FINETUNE, LIGHTNING, VAE, Models
from tests.support.hub import LoopbackHub
from weights import Bucket, Publication, find_snapshot
from weights.digests import describe_file

Publish = Callable[..., Publication]


@pytest.fixture
def publish(hub: Hub, bucket: Bucket, tmp_path: Path, quiet: Progress) -> Publish:
    def published(source: str | Path, **options: object) -> Publication:
        request = Request(str(source), **{"hub": hub, "folder": tmp_path / "prepared", **options})
        prepared = prepare(request, make_plan(request), quiet)
        publication = compare(request, prepared, bucket, quiet)
        upload(request, publication, quiet)
        return publication

    return published


def test_published_lightning_can_be_pulled_by_any_tool_and_loads_with_stock_diffusers(
    lightning_hub: LoopbackHub, publish: Publish, bucket: Bucket, tmp_path: Path
) -> None:
    # when
    version = publish(LIGHTNING).version
    # then: a plain S3 client finds a plain diffusers folder
    prefix = f"{LIGHTNING}/{version}/"
    for found in bucket.list(prefix):
        target = tmp_path / "pulled" / found.key.removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        bucket.client.download_file(bucket.name, found.key, str(target))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pulled", dtype=torch.float16)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.unet.dtype == torch.float16


def test_manifest_carries_the_recipe_and_its_source(
    lightning_hub: LoopbackHub, publish: Publish, bucket: Bucket
) -> None:
    publish(LIGHTNING)
    snapshot = find_snapshot(bucket, LIGHTNING)
    assert snapshot.recipe is not None
    assert snapshot.recipe["scheduler"]["config"] == {"timestep_spacing": "trailing"}
    assert snapshot.recipe["source"]["repo"] == LIGHTNING
    assert snapshot.recipe["source"]["licence"] == "openrail++"
    assert snapshot.recipe["source"]["parts"] == [
        f"{repo}@{lightning_hub.repositories[repo].branches['main']}"
        for repo in (LIGHTNING, BASE, VAE)
    ]
    paths = {file.path for file in snapshot.files}
    assert "recipe.json" not in paths
    assert not any(Path(path).name.startswith(".") for path in paths)


def test_unchanged_second_run_uploads_nothing(
    lightning_hub: LoopbackHub, publish: Publish, bucket: Bucket, s3: EmbeddedS3
) -> None:
    first = publish(LIGHTNING)
    before = len(s3.requests(bucket.name))
    # when, from a fresh folder so that every file is made again
    second = publish(LIGHTNING, folder=first.folder.parent / "again")
    # then
    assert second.unchanged
    assert second.version == first.version
    written = [
        request.key
        for request in s3.requests(bucket.name)[before:]
        if request.method in ("PUT", "POST")
    ]
    assert [key for key in written if not key.endswith("latest.json")] == []


def test_one_changed_file_uploads_one_file(
    models: Models, publish: Publish, own: Callable[[Path], Path]
) -> None:
    folder = own(models.full)
    publish(folder, name="me/model")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.13}))
    second = publish(folder, name="me/model")
    assert [entry.path for entry in second.uploads] == ["vae/config.json"]
    assert not second.unchanged


@pytest.mark.parametrize("place", ["Hub", "bucket"])
def test_what_was_checked_as_it_came_is_not_read_again_to_be_hashed(
    loopback_hub: LoopbackHub,
    models: Models,
    hub: Hub,
    publish: Publish,
    bucket: Bucket,
    s3: EmbeddedS3,
    tmp_path: Path,
    quiet: Progress,
    place: str,
) -> None:
    # given weights that are taken as they are
    loopback_hub.add(FINETUNE, models.finetune)
    source = FINETUNE
    if place == "bucket":
        publish(FINETUNE, folder=tmp_path / "first")
        source = f"s3://{bucket.name}/{FINETUNE}"
    access = load_source_settings(s3.environment())
    request = Request(source, name="me/model", hub=hub, folder=tmp_path / "prepared", access=access)
    # when
    folder = prepare(request, make_plan(request), quiet).folder
    # then their digests are known, each by its file, before anything is published
    known = digests_of(folder)
    weights = [file for file in folder.rglob("*.safetensors") if file.stat().st_size > 1_000_000]
    assert len(weights) > 1
    for file in weights:
        path = file.relative_to(folder).as_posix()
        assert known.recall(path, file.stat()) == describe_file(file, path)
    # and one that is written to afterwards is not believed
    weights[0].write_bytes(weights[0].read_bytes()[:-1] + b"x")
    assert known.recall("any", weights[0].stat()) is None
