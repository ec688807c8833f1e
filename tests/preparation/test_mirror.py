"""Any other SDXL repo: mirrored as it is, less what no pipeline needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from preparation import PreparationError, UsageError
from preparation.hub import Hub
from tests.preparation.conftest import BASE, FINETUNE, Models, Prepare
from tests.preparation.repositories import WEIGHTS, split
from tests.support.hub import LoopbackHub

Own = Callable[[Path], Path]


def test_repo_is_mirrored_with_a_recipe_from_its_configs(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    commit = loopback_hub.add(FINETUNE, models.finetune)
    prepared = run(FINETUNE)
    assert prepared.recipe.dtype == "float32"
    assert prepared.recipe.steps is None
    assert prepared.recipe.scheduler.config["timestep_spacing"] == "leading"
    assert prepared.recipe.source is not None
    assert prepared.recipe.source.model_dump() == {
        "repo": FINETUNE,
        "revision": commit,
        "licence": "fair-ai-public-license-1.0-sd",
        "parts": None,
    }
    for component, stem in WEIGHTS.items():
        path = f"{component}/{stem}.safetensors"
        assert (prepared.folder / path).read_bytes() == (models.full / path).read_bytes()
    StableDiffusionXLPipeline.from_pretrained(prepared.folder)


@pytest.mark.parametrize(
    "card", [b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xff\n---\n"]
)
def test_card_that_cannot_be_read_leaves_the_licence_unknown(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, own: Own, card: bytes
) -> None:
    repo = own(models.finetune)
    (repo / "README.md").write_bytes(card)
    loopback_hub.add(FINETUNE, repo)
    source = run(FINETUNE).recipe.source
    assert source is not None
    assert (source.repo, source.licence) == (FINETUNE, None)


def test_no_pickle_image_or_single_file_is_requested(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    run(FINETUNE)
    suffixes = {Path(file).suffix for file in loopback_hub.requested_files()}
    assert suffixes == {".json", ".md", ".safetensors", ".txt"}
    assert f"{FINETUNE}/finetune.safetensors" not in loopback_hub.requested_files()


def test_half_precision_variant_is_taken_alone_and_loses_its_suffix(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(BASE, models.base)
    prepared = run(BASE)
    taken = {file for file in loopback_hub.requested_files() if file.endswith(".safetensors")}
    assert taken == {f"{BASE}/{folder}/{stem}.fp16.safetensors" for folder, stem in WEIGHTS.items()}
    assert not list(prepared.folder.rglob("*fp16*"))
    assert prepared.recipe.dtype == "float16"
    StableDiffusionXLPipeline.from_pretrained(prepared.folder)


def test_sharded_variant_is_mirrored_with_an_index_of_its_plain_names(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, own: Own
) -> None:
    # given an fp16 UNet in two shards, named as diffusers names them, beside a plain one
    repo = own(models.base)
    shards = [
        f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    split(repo / "unet/diffusion_pytorch_model.fp16.safetensors", shards)
    loopback_hub.add(BASE, repo)
    # when
    folder = run(BASE).folder
    # then
    plain = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.loads((folder / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(plain)
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / "unet" / file)
    loaded = StableDiffusionXLPipeline.from_pretrained(folder).unet.state_dict()
    expected = load_file(models.half / "unet/diffusion_pytorch_model.safetensors")
    assert all(loaded[name].half().equal(tensor) for name, tensor in expected.items())


def test_pickle_only_component_is_refused_before_any_weights_move(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, own: Own
) -> None:
    repo = own(models.finetune)
    (repo / "unet/diffusion_pytorch_model.safetensors").unlink()
    loopback_hub.add(FINETUNE, repo)
    with pytest.raises(
        UsageError, match=r"only pickle weights \(unet/diffusion_pytorch_model\.bin\)"
    ):
        run(FINETUNE)
    assert loopback_hub.requested_files() == {
        f"{FINETUNE}/README.md",
        f"{FINETUNE}/model_index.json",
    }


def test_repo_without_a_model_index_is_refused(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add("someone/single-file", models.lightning)
    with pytest.raises(
        UsageError, match=r"has no model_index\.json.*give someone/single-file:sdxl_lightning"
    ):
        run("someone/single-file")


def test_repo_of_another_pipeline_is_refused(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, own: Own
) -> None:
    repo = own(models.finetune)
    (repo / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    loopback_hub.add("someone/flux", repo)
    with pytest.raises(UsageError, match=r"FluxPipeline.*Supported pipelines: StableDiffusionXL"):
        run("someone/flux")


def test_branch_is_resolved_to_a_commit_once_and_kept_to(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    commit = loopback_hub.add(FINETUNE, models.finetune, branch="refs/pr/3")
    assert run(FINETUNE, revision="refs/pr/3").recipe.source.revision == commit
    resolved = {
        request.path.split("/resolve/")[1].split("/")[0]
        for request in loopback_hub.requests
        if request.resolved_file
    }
    assert resolved == {commit}


def test_nothing_is_downloaded_twice(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    run(FINETUNE)
    loopback_hub.forget()
    run(FINETUNE)
    assert loopback_hub.requested_files() == set()


def test_download_that_broke_off_is_taken_up_again(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    # given storage that closes the connection in the middle of the UNet, once
    loopback_hub.add(FINETUNE, models.finetune)
    (files,) = loopback_hub.repositories[FINETUNE].commits.values()
    file = files["unet/diffusion_pytorch_model.safetensors"]
    loopback_hub.cut(f"/lfs/{file.sha256}", 100_000)
    # when
    folder = run(FINETUNE).folder
    # then
    asked = [request for request in loopback_hub.requests if file.sha256 in request.path]
    assert len(asked) == 2
    assert (folder / file.path).read_bytes() == file.place.read_bytes()


def test_damaged_file_in_the_cache_is_found_out(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, hub: Hub, tmp_path: Path
) -> None:
    # given a prepared folder that is gone, and a cache in which one byte has changed since
    loopback_hub.add(FINETUNE, models.finetune)
    run(FINETUNE)
    blob = max(hub.cache.rglob("blobs/*"), key=lambda file: file.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    # when, then
    with pytest.raises(
        PreparationError, match=r"diffusion_pytorch_model\.safetensors .* is damaged on this disk"
    ):
        run(FINETUNE, folder=tmp_path / "elsewhere")
