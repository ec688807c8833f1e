"""Another VAE, another precision, other shards: what is asked for is what comes out, and the rest stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file

from preparation import Options, UsageError, parse_size
from preparation.assemble import is_rewritten
from preparation.folder import LocalFolder
from preparation.plan import as_split, plan_mirror
from tests.preparation.conftest import FINETUNE, VAE, Models, Prepare
from tests.support.hub import LoopbackHub
from tests.support.small_families import write_small_sd3

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_another_vae_takes_the_place_of_the_models_own(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    commit = loopback_hub.add(VAE, models.vae)

    prepared = run(models.full, name="me/model", options=Options(vae=VAE))

    ours = AutoencoderKL.from_pretrained(prepared.folder / "vae").state_dict()
    theirs = AutoencoderKL.from_pretrained(models.vae).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert (prepared.folder / UNET).read_bytes() == (models.full / UNET).read_bytes()
    assert prepared.recipe.source is not None
    assert prepared.recipe.source.parts == (f"{VAE}@{commit}",)


def test_the_vae_of_a_whole_pipeline_on_this_disk_will_do(run: Prepare, models: Models) -> None:
    prepared = run(models.full, name="me/model", options=Options(vae=str(models.other_full)))

    path = "vae/diffusion_pytorch_model.safetensors"
    assert (prepared.folder / path).read_bytes() == (models.other_full / path).read_bytes()


def test_a_vae_of_another_shape_than_its_config_says_is_refused(
    run: Prepare, models: Models, tmp_path: Path
) -> None:
    sd3 = write_small_sd3(tmp_path / "sd3", with_t5=False)
    config = (models.full / "vae/config.json").read_bytes()
    (sd3 / "vae/config.json").write_bytes(config)

    with pytest.raises(UsageError, match=r"compared with its AutoencoderKL config|has shape"):
        run(models.full, name="me/model", options=Options(vae=str(sd3)))


def test_a_vae_for_another_kind_of_model_is_refused(
    run: Prepare, models: Models, tmp_path: Path
) -> None:
    sd3 = write_small_sd3(tmp_path / "sd3", with_t5=False)

    with pytest.raises(UsageError, match=r"latents of 16 channels with 4 levels, where .* has 4 "):
        run(models.full, name="me/model", options=Options(vae=str(sd3)))


def test_where_a_folder_lies_on_this_disk_is_not_published(
    run: Prepare, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/vae").symlink_to(models.other_full)
    monkeypatch.chdir(tmp_path)
    options = Options(vae="private/vae")

    prepared = run(models.full, name="me/model", options=options)

    assert prepared.recipe.source is not None
    assert "private" not in str(prepared.recipe.source.parts)
    assert "private" not in str(options.recorded())


def test_the_home_of_nobody_is_refused(run: Prepare, models: Models) -> None:
    with pytest.raises(UsageError, match="~nobody-at-all/vae"):
        run(models.full, name="me/model", options=Options(vae="~nobody-at-all/vae"))


def test_a_place_without_a_vae_is_refused(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/README.md").write_text("nothing")
    loopback_hub.add("someone/nothing", tmp_path / "empty")

    with pytest.raises(UsageError, match=r"--vae someone/nothing has no config.json"):
        run(models.full, name="me/model", options=Options(vae="someone/nothing"))


def test_every_weight_is_cast_as_torch_casts_it_and_the_recipe_says_so(
    run: Prepare, models: Models
) -> None:
    prepared = run(models.full, name="me/model", options=Options(dtype="bfloat16"))

    assert prepared.recipe.dtype == "bfloat16"
    for path in sorted(models.full.rglob("*.safetensors")):
        cast = load_file(prepared.folder / path.relative_to(models.full))
        for name, tensor in load_file(path).items():
            expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert cast[name].equal(expected), name
    StableDiffusionXLPipeline.from_pretrained(prepared.folder, dtype=torch.bfloat16)


def test_files_over_the_wanted_size_are_split(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)

    prepared = run(FINETUNE, options=Options(max_shard_size=parse_size("2MB")))

    shards = sorted((prepared.folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size <= 2_100_000 for shard in shards)
    StableDiffusionXLPipeline.from_pretrained(prepared.folder)


def test_files_of_a_published_model_stay_as_they_were_split(models: Models) -> None:
    listed = LocalFolder.open(models.full)
    plan = plan_mirror(LocalFolder(listed.root, {**listed.files, UNET: 2_000_000_000}), None, 1)
    unet = next(component for component in plan.components if component.name == "unet")

    assert is_rewritten(unet, plan)
    assert not is_rewritten(unet, as_split(plan))


@pytest.mark.parametrize(
    ("text", "size"), [("960MB", 960_000_000), ("2 gb", 2_000_000_000), ("1.5G", 1_500_000_000)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "10kB", "1TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|is less than"):
        parse_size(text)
