"""A VAE that would overflow float16 is found at preparation, and marked so that its images are right in float16."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file

from demo.s3 import EmbeddedS3
from demo.small_sdxl import write_small_sdxl
from diffusion.engine import GenerationRequest
from diffusion.latents import unscaled
from preparation import Options, Progress, Request, UsageError, compare, make_plan, prepare, upload
from preparation.assemble import Prepared
from preparation.hub import Hub
from preparation.largest import largest_number
from preparation.overflow import FLOAT16_MAX, MARGIN
from settings import load_source_settings
from tests.preparation.conftest import FINETUNE, VAE, Models, Prepare, Ran
from tests.preparation.served import served as engine_of
from tests.preparation.sources import put_folder
from tests.support.hub import LoopbackHub
from tests.support.small_families import stock_pipeline, write_small_sd3, write_small_sd_turbo
from weights import Bucket

Own = Callable[[Path], Path]
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"
PROMPT = "a golden fox over the castle"
SIZE = {"width": 64, "height": 64}
LAST_BLOCK = "decoder.up_blocks.3.resnets"


def make_loud(vae: Path, largest: float) -> Path:
    """Have the VAE's decoder reach about so much inside, and decode to the same pixels as before.

    What runs through the last block is scaled, all that is added to it alike, up to the norm that comes after.
    """
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    factor = 1.0
    for _ in range(2):  # what is scaled is at first not what is largest
        factor = largest / reached(vae) * factor
        loud = {
            name: tensor.float() * (factor if is_in_the_stream(name, weights) else 1.0)
            for name, tensor in weights.items()
        }
        save_file(loud, file, metadata={"format": "pt"})
    assert max(float(tensor.abs().max()) for tensor in loud.values()) < FLOAT16_MAX
    return vae


def is_in_the_stream(name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a weight's result is added to what runs through the last block, or is that."""
    if f"{LAST_BLOCK}.0.conv_shortcut.weight" in weights:
        entry: tuple[str, ...] = (f"{LAST_BLOCK}.0.conv_shortcut.",)
    else:
        entry = ("decoder.up_blocks.2.upsamplers.0.conv.",)
    return name.startswith(entry) or (name.startswith(LAST_BLOCK) and ".conv2." in name)


def reached(vae: Path) -> float:
    return largest_number(AutoencoderKL.from_pretrained(vae, local_files_only=True).eval())


def mark(folder: Path) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "force_upcast": True}))
    return folder


def upcasts(folder: Path) -> bool:
    return bool(json.loads((folder / CONFIG).read_text())["force_upcast"])


def decoded(folder: Path, dtype: torch.dtype, latents: torch.Tensor) -> torch.Tensor:
    """By stock diffusers' VAE alone, with no look at any mark."""
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
    with torch.inference_mode():
        pixels: torch.Tensor = vae.decode(unscaled(latents.to(dtype), vae.config)).sample
    return pixels


@pytest.fixture(scope="module")
def loud_model(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(models.full, tmp_path_factory.mktemp("loud") / "loud")
    make_loud(folder / "vae", 4 * FLOAT16_MAX)
    assert not upcasts(folder)
    return folder


@pytest.fixture
def loud(loud_model: Path, own: Own) -> Path:
    """A finetune of SDXL whose VAE overflows, and whose config does not say so."""
    return own(loud_model)


Told = Callable[..., tuple[Prepared, list[str]]]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """Prepare a folder; returns also the lines that were said of its VAE on the way."""

    def prepared(source: str | Path, **options: Any) -> tuple[Prepared, list[str]]:
        stream = io.StringIO()
        asked: dict[str, Any] = {"name": "me/model", "folder": tmp_path / "prepared"}
        request = Request(str(source), **asked | options)
        made = prepare(request, make_plan(request), Progress(stream))
        return made, [line for line in stream.getvalue().splitlines() if "float16" in line]

    return prepared


Served = Callable[[Prepared], np.ndarray]


@pytest.fixture
def served(bucket: Bucket, quiet: Progress) -> Served:
    """The image that our engine makes of a published model in float16."""

    def image(prepared: Prepared) -> np.ndarray:
        request = Request("unused", name="me/model")
        upload(request, compare(request, prepared, bucket, quiet), quiet)
        wanted = GenerationRequest(PROMPT, **SIZE, seed=5, steps=2)
        (made,) = engine_of(bucket, "me/model", torch.float16).generate(wanted)
        return np.asarray(made.image)

    return image


def of_stock(folder: Path, **call: Any) -> Any:
    """What stock diffusers makes of the folder in float16."""
    pipeline = stock_pipeline(folder, dtype=torch.float16)
    generator = torch.Generator("cpu").manual_seed(5)
    return pipeline(PROMPT, **SIZE, num_inference_steps=2, generator=generator, **call).images


def test_an_unmarked_vae_of_sdxl_that_overflows_is_marked_and_its_images_are_stocks(
    loud: Path, told: Told, served: Served
) -> None:
    prepared, (line,) = told(loud, options=Options(dtype="float16"))

    # float16 itself: without a mark nothing comes of it, with it the colours do.
    (latents,) = of_stock(loud, output_type="latent")
    assert not decoded(prepared.folder, torch.float16, latents[None]).isfinite().all()
    assert upcasts(prepared.folder)
    (image,) = of_stock(prepared.folder)
    np.testing.assert_array_equal(served(prepared), np.asarray(image))
    assert np.asarray(image).std() > 5, "a picture, and not black"
    assert "vae of" in line
    assert "now says so (force_upcast)" in line
    assert f"--vae {VAE}" in line
    assert not prepared.recipe.vae_overflows


FAMILIES = [
    pytest.param(write_small_sd_turbo, id="SD-Turbo"),
    pytest.param(partial(write_small_sd3, with_t5=False), id="SD3"),
]


@pytest.mark.parametrize("write", FAMILIES)
def test_where_the_pipeline_heeds_no_mark_the_recipe_has_the_vae_decode_in_float32(
    write: Callable[[Path], Path], told: Told, served: Served, tmp_path: Path
) -> None:
    source = write(tmp_path / "source")
    make_loud(source / "vae", 4 * FLOAT16_MAX)
    assert upcasts(source), "a default that says nothing"

    prepared, (line,) = told(source, options=Options(dtype="float16"))

    assert prepared.recipe.vae_overflows
    assert "the recipe now says so (vae_overflows)" in line
    assert (prepared.folder / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
    latents = of_stock(prepared.folder, output_type="latent")
    assert not decoded(prepared.folder, torch.float16, latents).isfinite().all()
    pixels = decoded(prepared.folder, torch.float32, latents)
    (image,) = VaeImageProcessor().postprocess(pixels, output_type="pil")
    np.testing.assert_array_equal(served(prepared), np.asarray(image))
    assert np.asarray(image).std() > 5, "a picture, and not black"


@pytest.mark.parametrize("write", [write_small_sdxl, *FAMILIES])
def test_a_vae_that_fits_stays_as_it_is_and_nothing_is_said(
    write: Callable[[Path], Path], told: Told, tmp_path: Path
) -> None:
    source = write(tmp_path / "source")

    prepared, lines = told(source, options=Options(dtype="float16"))

    assert lines == []
    assert "vae_overflows" not in prepared.recipe.model_dump(mode="json")
    assert (prepared.folder / CONFIG).read_bytes() == (source / CONFIG).read_bytes()


def test_a_mark_without_need_is_its_authors_and_what_it_costs_is_said(
    models: Models, own: Own, told: Told
) -> None:
    source = mark(own(models.full))

    prepared, (line,) = told(source)

    assert (prepared.folder / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
    assert "left as its authors have it" in line
    assert "takes longer and more memory" in line
    assert '"force_upcast": false' in line


def test_a_mark_with_need_stays_and_another_vae_is_named(loud: Path, told: Told) -> None:
    mark(loud)

    prepared, (line,) = told(loud)

    assert (prepared.folder / CONFIG).read_bytes() == (loud / CONFIG).read_bytes()
    assert "its config.json says so (force_upcast)" in line
    assert f"--vae {VAE}" in line


@pytest.mark.parametrize(("share", "is_marked"), [(1.2, True), (0.8, False)])
def test_what_is_too_near_to_the_end_of_float16_counts_too(
    models: Models, own: Own, told: Told, share: float, is_marked: bool
) -> None:
    source = own(models.full)
    make_loud(source / "vae", share * FLOAT16_MAX / MARGIN)

    prepared, lines = told(source)

    assert upcasts(prepared.folder) == is_marked
    assert ["too near" in line for line in lines] == ([True] if is_marked else [])


def test_sums_between_two_modules_are_seen(models: Models) -> None:
    class Summing(AutoencoderKL):
        def decode(self, z: torch.Tensor, return_dict: bool = True, **_: Any) -> Any:
            there_and_back = (z + 1e6) - 1e6
            return super().decode(there_and_back, return_dict=return_dict)

    plain = AutoencoderKL.from_pretrained(models.full / "vae").eval()
    summing = Summing.from_pretrained(models.full / "vae").eval()

    assert largest_number(plain) < 1e3
    assert largest_number(summing) > 1e6


def test_a_repo_and_a_bucket_are_looked_at_as_a_folder_is(
    loud: Path,
    told: Told,
    loopback_hub: LoopbackHub,
    hub: Hub,
    new_bucket: Callable[[], str],
    admin: Any,
    s3: EmbeddedS3,
) -> None:
    loopback_hub.add(FINETUNE, loud)
    bucket = new_bucket()
    put_folder(admin, bucket, loud, "models/loud")
    access = load_source_settings(s3.environment())

    from_hub, (said_of_repo,) = told(FINETUNE, name="me/one", hub=hub)
    from_bucket, (said_of_bucket,) = told(f"s3://{bucket}/models/loud", access=access)

    assert upcasts(from_hub.folder)
    assert upcasts(from_bucket.folder)
    assert f"vae of {FINETUNE}" in said_of_repo
    assert f"vae of s3://{bucket}/models/loud" in said_of_bucket


def test_the_vae_that_is_asked_for_is_the_one_that_is_looked_at(
    loud: Path, models: Models, told: Told, tmp_path: Path
) -> None:
    bad, (line,) = told(models.other_full, options=Options(vae=str(loud)))
    good, nothing = told(
        loud, options=Options(vae=str(models.other_full)), folder=tmp_path / "second"
    )

    assert upcasts(bad.folder)
    assert str(loud) in line
    assert not upcasts(good.folder)
    assert nothing == []


def test_what_a_recipe_says_of_a_vae_goes_with_it(told: Told, tmp_path: Path) -> None:
    source = write_small_sd_turbo(tmp_path / "source")
    other = write_small_sd_turbo(tmp_path / "other", seed=1)
    recipe = told(source)[0].recipe.model_copy(update={"vae_overflows": True})
    (source / "recipe.json").write_text(recipe.model_dump_json())

    kept, _ = told(source)
    replaced, _ = told(source, options=Options(vae=str(other)))

    assert kept.recipe.vae_overflows
    assert not replaced.recipe.vae_overflows


def test_a_folder_that_is_already_prepared_is_not_tried_again(loud: Path, tmp_path: Path) -> None:
    request = Request(str(loud), name="me/model", folder=tmp_path / "prepared")
    plan = make_plan(request)
    first, second = io.StringIO(), io.StringIO()

    before = prepare(request, plan, Progress(first))
    after = prepare(request, plan, Progress(second))

    assert "Try VAE" in first.getvalue()
    assert second.getvalue() == f"Already prepared in {after.folder}\n"
    assert before == after
    assert upcasts(after.folder)


def test_a_vae_that_decodes_to_nothing_in_any_dtype_is_refused(
    models: Models, own: Own, told: Told, tmp_path: Path
) -> None:
    source = own(models.full)
    weights = {name: tensor.clone() for name, tensor in load_file(source / WEIGHTS).items()}
    weights["decoder.conv_in.bias"][0] = float("nan")
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})

    with pytest.raises(UsageError, match=r"vae of .* decodes to NaN or infinity even in float32"):
        told(source)

    assert not list((tmp_path / "prepared").glob("*"))


def test_a_vae_of_another_class_is_refused_before_anything_is_built(
    models: Models, own: Own, told: Told, tmp_path: Path
) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    source = own(models.full)
    index = json.loads((source / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (source / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(
        UsageError, match=r"--vae .*tiny is an AutoencoderTiny.*AutoencoderKL alone"
    ):
        told(models.full, options=Options(vae=str(tmp_path / "tiny")))
    with pytest.raises(UsageError, match=r"asks for vae to be an AutoencoderTiny.*AutoencoderKL"):
        told(source)


def test_a_dry_run_says_that_the_config_may_change(
    loud: Path, command: Callable[..., Ran], loopback_hub: LoopbackHub, bucket: Bucket
) -> None:
    loopback_hub.add(FINETUNE, loud)

    ran = command(FINETUNE, bucket.name, "--dry-run")

    assert ran.code == 0, ran.err
    assert "vae/config.json (with force_upcast set, should the VAE overflow float16)" in ran.out


def test_a_vae_that_its_config_does_not_describe_is_the_sources_fault(
    run: Prepare, models: Models, own: Callable[[Path], Path]
) -> None:
    folder = own(models.full)
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 2}))

    with pytest.raises(UsageError, match=r"vae of .* not of one model: get both again"):
        run(folder, name="me/model")
