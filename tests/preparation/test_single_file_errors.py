"""Single files that cannot be published: what is wrong with each, before anything is written to a bucket."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.small_sdxl import write_small_sdxl
from preparation import Options, PreparationError, Request, UsageError, make_plan
from preparation.hub import Hub
from tests.preparation.conftest import BASE, Prepare
from tests.preparation.test_single_file import small_sdxl
from tests.support.hub import LoopbackHub
from tests.support.single_files import write_single_file
from tests.support.small_families import write_small_sd1


def with_names(folder: Path, *names: str, name: str = "one.safetensors") -> Path:
    """A safetensors file of tensors that mean nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({one: torch.zeros(2, 2) for one in names}, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",),
            r"is a single-file checkpoint like black-forest-labs/FLUX.* cannot be served.*name that with --base",
        ),
        (
            ("model.diffusion_model.something.weight", "first_stage_model.else.weight"),
            "of a kind that diffusers does not recognise, which cannot be served",
        ),
        (
            ("lora_unet_down_blocks_0.lora_down.weight",),
            "is a LoRA, which changes a model and is none.*--lora",
        ),
        (
            ("model.diffusion_model.x.weight", "model.diffusion_model.x.scale_weight"),
            "holds 8-bit weights with scales of their own",
        ),
        (
            ("model.diffusion_model.x.weight", "model.diffusion_model.x.weight_scale"),
            r"holds 8-bit weights with scales of their own \(model.*x\.weight_scale\)",
        ),
        (
            ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
            r"family that can be served: it holds conv_in\.weight, down_blocks.* of its whole pipeline",
        ),
        ((), "it holds none"),
    ],
)
def test_a_file_of_an_unknown_family_is_named_for_what_it_is(
    hub: Hub, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    file = with_names(tmp_path, *names)

    with pytest.raises(UsageError, match=message):
        make_plan(Request(str(file), name="me/one", hub=hub, folder=tmp_path / "prepared"))


def test_weights_that_are_integers_are_refused_and_positions_are_not(
    run: Prepare, tmp_path: Path
) -> None:
    base = small_sdxl(tmp_path / "base")
    file = write_single_file(base, tmp_path / "one.safetensors")
    tensors = load_file(file)
    prefix = "conditioner.embedders.0.transformer.text_model.embeddings"
    save_file({**tensors, f"{prefix}.position_ids": torch.arange(77)[None]}, file)
    run(file, name="me/one", base=str(base))

    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(UsageError, match=r"weights as integers \(model.*0\.0\.weight is I8\)"):
        run(file, name="me/one", base=str(base))


def test_a_file_that_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no file .*one\.safetensors.*OWNER/NAME:FILE"):
        make_plan(Request(str(tmp_path / "one.safetensors"), name="me/one", hub=hub))


def test_a_file_that_a_repo_lacks_is_said_with_those_it_has(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    with_names(tmp_path / "repo", "a", name="other.safetensors")
    loopback_hub.add("someone/finetune", tmp_path / "repo")

    with pytest.raises(UsageError, match=r"no file one\.safetensors.*are other\.safetensors"):
        make_plan(Request("someone/finetune:one.safetensors", hub=hub))


@pytest.mark.parametrize("where", ["local", "hub"])
def test_a_file_cut_short_is_refused(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path, where: str
) -> None:
    whole = with_names(tmp_path, "model.diffusion_model.x")
    cut = tmp_path / "repo/cut.safetensors"
    cut.parent.mkdir()
    cut.write_bytes(whole.read_bytes()[:20])
    loopback_hub.add("someone/finetune", cut.parent)
    source = str(cut) if where == "local" else "someone/finetune:cut.safetensors"

    with pytest.raises(PreparationError, match=r"cut\.safetensors"):
        make_plan(Request(source, name="me/one", hub=hub))


def test_a_base_of_another_family_is_refused_and_leaves_nothing(
    run: Prepare, tmp_path: Path
) -> None:
    source = small_sdxl(tmp_path / "source")
    file = write_single_file(source, tmp_path / "one.safetensors")
    wider = small_sdxl(tmp_path / "wider")
    config = wider / "unet/config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))

    with pytest.raises(
        UsageError, match=r"unet of .*one\.safetensors (has no|does not fit|: up_blocks).*--base"
    ):
        run(file, name="me/one", base=str(wider))

    assert not [path for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"]


def test_a_part_that_misses_tensors_is_refused(run: Prepare, tmp_path: Path) -> None:
    source = small_sdxl(tmp_path / "source")
    file = write_single_file(source, tmp_path / "one.safetensors")
    tensors = load_file(file)
    del tensors["first_stage_model.decoder.conv_in.weight"]
    save_file(tensors, file)

    with pytest.raises(
        UsageError, match=r"vae of .* has no decoder\.conv_in\.weight, which its config"
    ):
        run(file, name="me/one", base=str(source))


def test_a_base_that_cannot_be_had_says_what_it_was_for(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    file = write_single_file(small_sdxl(tmp_path / "source"), tmp_path / "one.safetensors")

    message = (
        rf"no model repo {BASE}.*asked for the configs.*one\.safetensors; --base names another"
    )
    with pytest.raises(UsageError, match=message):
        make_plan(Request(str(file), name="me/one", hub=hub))

    loopback_hub.add(BASE, tmp_path / "source", gated=True)
    with pytest.raises(UsageError, match=r"is gated.*HF_TOKEN"):
        make_plan(Request(str(file), name="me/one", hub=hub))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "someone/model", "base": "a/b"}, "--base is for single-file checkpoints"),
        ({"source": "one.safetensors", "revision": "main"}, "--revision is of a Hub repo"),
        ({"source": "one.safetensors", "name": None}, "from a local file needs a name.*me/one"),
    ],
)
def test_options_that_do_not_go_with_the_source_are_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with_names(tmp_path, "model.diffusion_model.x")

    with pytest.raises(UsageError, match=message):
        make_plan(Request(**{"hub": hub, "name": "me/one", **changes}))


def test_a_private_repos_file_needs_a_token(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    source = small_sdxl(tmp_path / "source")
    (tmp_path / "repo").mkdir()
    shutil.move(write_single_file(source, tmp_path / "one.safetensors"), tmp_path / "repo")
    loopback_hub.add("someone/finetune", tmp_path / "repo", private=True)
    loopback_hub.add(BASE, source)

    with pytest.raises(UsageError, match=r"or it is private.*HF_TOKEN"):
        make_plan(Request("someone/finetune:one.safetensors", hub=hub))

    allowed = Hub(endpoint=hub.endpoint, cache_dir=hub.cache_dir, token="hf_reader")
    make_plan(Request("someone/finetune:one.safetensors", hub=allowed))
    # The storage, which is another host, never saw the token.
    assert not any(
        request.authorised for request in loopback_hub.requests if request.path.startswith("/lfs/")
    )


def test_a_base_of_another_family_is_refused_before_anything_moves(
    hub: Hub, tmp_path: Path
) -> None:
    file = write_single_file(write_small_sd1(tmp_path / "sd1"), tmp_path / "one.safetensors")
    base = small_sdxl(tmp_path / "base")

    with pytest.raises(UsageError, match=r"not of the family of .*base.*takes it for 'v1'"):
        make_plan(Request(str(file), name="me/one", base=str(base), hub=hub))


@pytest.mark.parametrize("option", ["base", "vae"])
def test_what_is_in_a_bucket_cannot_be_part_of_another(
    hub: Hub, tmp_path: Path, option: str
) -> None:
    source = small_sdxl(tmp_path / "source")
    file = write_single_file(source, tmp_path / "one.safetensors")
    changes: dict[str, Any] = (
        {"base": "s3://a/b"}
        if option == "base"
        else {"base": str(source), "options": Options(vae="s3://a/b")}
    )

    with pytest.raises(UsageError, match=r"s3://a/b cannot be read from here"):
        make_plan(Request(str(file), name="me/one", hub=hub, **changes))


def test_a_recipe_for_another_pipeline_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = write_small_sdxl(tmp_path / "source", text_2_layers=10)
    file = write_single_file(source, tmp_path / "one.safetensors")
    recipe = source / "recipe.json"
    recipe.write_text(recipe.read_text().replace("DiffusionXLPipeline", "DiffusionPipeline"))

    with pytest.raises(UsageError, match=r"recipe\.json .* is for a StableDiffusionPipeline"):
        make_plan(Request(str(file), name="me/one", base=str(source), hub=hub))
