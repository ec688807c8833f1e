"""A tiny VAE published beside a model, for previews: where it comes from, what it is held to, what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffusion.engine import GenerationRequest
from diffusion.watching import Step
from preparation import Options, UsageError
from preparation.patterns import Patterns
from tests.preparation.conftest import FINETUNE, LIGHTNING, Models, Prepare, Ran
from tests.preparation.repositories import write_card
from tests.preparation.served import served
from tests.preparation.sources import files_of, publish_model, published_files
from tests.support.hub import LoopbackHub
from weights import Bucket

TINY = "madebyollin/taesdxl"
WEIGHTS = "preview_vae/diffusion_pytorch_model.safetensors"
PREVIEW_FILES = {"preview_vae/config.json", WEIGHTS}


def write_tiny(folder: Path, latent_channels: int = 4) -> Path:
    """The repo's layout, with what other programs read beside it; weights drawn at random."""
    torch.manual_seed(3)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        latent_channels=latent_channels,
    ).save_pretrained(folder)
    (folder / "taesdxl_decoder.safetensors").write_bytes(b"for another program")
    write_card(folder, "mit")
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def test_it_lies_beside_the_model_whose_other_files_stay_as_they_are(
    run: Prepare, models: Models, tiny: Path, tmp_path: Path
) -> None:
    plain = files_of(run(models.full, name="me/plain").folder)

    prepared = run(models.full, name="me/model", options=Options(preview_vae=str(tiny)))

    files = files_of(prepared.folder)
    assert files.keys() - plain.keys() == PREVIEW_FILES
    assert {path: files[path] for path in plain if path != ".prepared.json"} == {
        path: data for path, data in plain.items() if path != ".prepared.json"
    }
    assert files[WEIGHTS] == (tiny / "diffusion_pytorch_model.safetensors").read_bytes()


def test_stock_diffusers_reads_the_folder_as_if_it_were_not_there(
    run: Prepare, models: Models, tiny: Path
) -> None:
    prepared = run(models.full, name="me/model", options=Options(preview_vae=str(tiny)))

    pipeline = StableDiffusionXLPipeline.from_pretrained(prepared.folder)

    assert (
        pipeline.components.keys()
        == StableDiffusionXLPipeline.from_pretrained(models.full).components.keys()
    )
    assert isinstance(
        AutoencoderTiny.from_pretrained(prepared.folder / "preview_vae"), AutoencoderTiny
    )


def test_auto_is_the_one_that_the_family_is_known_by_for_sdxl_lightning_too(
    lightning_hub: LoopbackHub, run: Prepare, tiny: Path
) -> None:
    commit = lightning_hub.add(TINY, tiny)

    prepared = run(LIGHTNING, options=Options(preview_vae="auto"))

    assert (
        load_file(prepared.folder / WEIGHTS).keys()
        == load_file(tiny / "diffusion_pytorch_model.safetensors").keys()
    )
    assert prepared.recipe.source is not None
    assert prepared.recipe.source.parts is not None
    assert prepared.recipe.source.parts[-1] == f"{TINY}@{commit}"
    assert f"{TINY}/taesdxl_decoder.safetensors" not in lightning_hub.requested_files()


def test_none_is_published_unless_it_is_asked_for(lightning_hub: LoopbackHub, run: Prepare) -> None:
    assert not (run(LIGHTNING).folder / "preview_vae").exists()


def test_it_is_cast_with_the_model(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, tiny: Path
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)

    prepared = run(FINETUNE, options=Options(preview_vae=str(tiny), dtype="float16"))

    cast = load_file(prepared.folder / WEIGHTS)
    for name, tensor in load_file(tiny / "diffusion_pytorch_model.safetensors").items():
        assert cast[name].equal(tensor.half())


def test_a_vae_of_another_class_is_refused_with_one_that_will_do(
    run: Prepare, models: Models
) -> None:
    with pytest.raises(UsageError, match=r"is an AutoencoderKL, .* madebyollin/taesdxl will do"):
        run(models.full, name="me/model", options=Options(preview_vae=str(models.vae)))


def test_one_for_other_latents_is_refused(run: Prepare, models: Models, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "sd3", latent_channels=16)

    with pytest.raises(UsageError, match=r"latents of 16 channels with 4 levels, where .* has 4 "):
        run(models.full, name="me/model", options=Options(preview_vae=str(tiny)))


def test_weights_that_are_not_its_config_s_are_refused(
    run: Prepare, models: Models, tiny: Path
) -> None:
    config = json.loads((tiny / "config.json").read_bytes())
    config["decoder_block_out_channels"] = [16, 16, 16, 16]
    (tiny / "config.json").write_text(json.dumps(config))

    with pytest.raises(UsageError, match=r"preview_vae of .* AutoencoderTiny config"):
        run(models.full, name="me/model", options=Options(preview_vae=str(tiny)))


def test_a_place_without_one_is_refused(run: Prepare, models: Models, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageError, match=r"--preview-vae .*empty has no config.json"):
        run(models.full, name="me/model", options=Options(preview_vae=str(tmp_path / "empty")))


def test_a_published_model_makes_previews_with_it_and_stays_the_same_version_elsewhere(
    run: Prepare, models: Models, tiny: Path, bucket: Bucket, tmp_path: Path
) -> None:
    prepared = run(models.full, name="me/model", options=Options(preview_vae=str(tiny)))
    version = publish_model(prepared.folder, bucket, "me/model", tmp_path / "work")

    engine = served(bucket, "me/model")
    steps: list[Step] = []
    request = GenerationRequest(prompt="a fox", width=64, height=64, steps=2, seed=1)
    list(engine.generate(request, None, steps.append, previews=True))

    assert published_files(bucket, "me/model").keys() >= PREVIEW_FILES
    assert [step.preview.size for step in steps if step.preview] == [(64, 64)] * 2
    again = publish_model(prepared.folder, bucket, "me/copy", tmp_path / "work")
    assert again == version


def test_a_pattern_may_leave_it_behind(
    run: Prepare, models: Models, tiny: Path, tmp_path: Path
) -> None:
    with_preview = run(models.full, name="me/model", options=Options(preview_vae=str(tiny))).folder

    without = run(with_preview, name="me/less", patterns=Patterns(ignore=("preview_vae/*",))).folder

    assert (with_preview / WEIGHTS).exists()
    assert not (without / "preview_vae").exists()


def test_another_one_takes_the_place_of_the_one_a_model_has(
    run: Prepare, models: Models, tiny: Path, tmp_path: Path
) -> None:
    first = run(models.full, name="me/model", options=Options(preview_vae=str(tiny))).folder
    torch.manual_seed(9)
    other = tmp_path / "other"
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    ).save_pretrained(other)

    second = run(first, name="me/second", options=Options(preview_vae=str(other))).folder

    assert (second / WEIGHTS).read_bytes() == (
        other / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_the_command_shows_what_it_would_publish(
    command: Callable[..., Ran], models: Models, tiny: Path, bucket: Bucket
) -> None:
    ran = command(
        models.full, bucket.name, "--name", "me/model", "--preview-vae", tiny, "--dry-run"
    )

    assert ran.code == 0, ran.err
    assert WEIGHTS in ran.out
