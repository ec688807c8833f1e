"""Single-file checkpoints: from a repo or a disk to the pixels that stock diffusers gets from the very file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo.small_sdxl import write_small_sdxl
from diffusion.engine import GenerationRequest
from diffusion.families import family_of
from preparation import Options, Progress, Request, compare, make_plan, upload
from preparation.hub import Hub
from preparation.lora import LoraName
from tests.preparation.conftest import BASE, LIGHTNING, Prepare
from tests.preparation.served import served
from tests.preparation.test_lora import deltas, picture, saved, weights_of
from tests.support.hub import LoopbackHub
from tests.support.single_files import write_single_file
from tests.support.small_families import write_small_sd1, write_small_sd2, write_small_sd3
from weights import Bucket

PROMPT = "a golden fox over the castle"
SIZE = {"width": 64, "height": 64}
FILE = "someone/finetune:models/finetune.safetensors"


def small_sdxl(folder: Path, seed: int = 0) -> Path:
    """With as many layers in the second text encoder as tell the family."""
    return write_small_sdxl(folder, seed=seed, lightning=False, text_2_layers=10)


@dataclass(frozen=True)
class Known:
    """An architecture, the repo that diffusers takes its configs from, and what stands in for that."""

    base: str
    write: Callable[[Path, int], Path]
    named: bool = False  # the small one is not recognised, so the base has to be named


KNOWN = [
    Known(BASE, small_sdxl),
    Known(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        lambda folder, seed: write_small_sd1(folder, seed=seed),
    ),
    Known(
        "stabilityai/stable-diffusion-2-1",
        lambda folder, seed: write_small_sd2(folder, seed=seed),
    ),
    Known(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        lambda folder, seed: write_small_sd3(folder, seed=seed),
        named=True,
    ),
    Known(
        "stabilityai/stable-diffusion-3.5-medium",
        lambda folder, seed: write_small_sd3(folder, seed=seed, is_3_5_medium=True),
        named=True,
    ),
    Known(
        "stabilityai/stable-diffusion-3.5-large",
        lambda folder, seed: write_small_sd3(folder, seed=seed, is_3_5_large=True),
    ),
]


def stock(file: Path, configs: Path, **options: Any) -> Any:
    """What anybody gets from diffusers itself."""
    name = (configs / "model_index.json").read_text()
    (class_name,) = {found for found in dir(diffusers) if f'"{found}"' in name} & {
        "StableDiffusionXLPipeline",
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
    }
    pipeline = getattr(diffusers, class_name).from_single_file(
        file, config=str(configs), local_files_only=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # it leaves T5's dropout on
            part.requires_grad_(
                False
            )  # torch multiplies batches with other rounding where weights ask for gradients
    return pipeline


def on_hub(folder: Path, hub: LoopbackHub, file: Path) -> None:
    """A repo that holds a checkpoint, and nothing that says what it is."""
    (folder / "models").mkdir(parents=True)
    shutil.copyfile(file, folder / "models/finetune.safetensors")
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    hub.add("someone/finetune", folder)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.base)
def test_a_single_file_gives_the_pixels_of_stock_from_single_file(
    loopback_hub: LoopbackHub,
    run: Prepare,
    hub: Hub,
    bucket: Bucket,
    quiet: Progress,
    tmp_path: Path,
    known: Known,
) -> None:
    base = known.write(tmp_path / "base", 0)
    file = write_single_file(known.write(tmp_path / "finetune", 1), tmp_path / "one.safetensors")
    loopback_hub.add(known.base, base)
    on_hub(tmp_path / "repo", loopback_hub, file)
    named = known.base if known.named else None
    request = Request(FILE, hub=hub, folder=tmp_path / "prepared", base=named)

    prepared = run(FILE, base=named)
    upload(request, compare(request, prepared, bucket, quiet), quiet)
    engine = served(bucket, "someone/finetune")
    (made,) = engine.generate(GenerationRequest(PROMPT, **SIZE, seed=5, steps=3))

    expected = stock(file, base)(
        PROMPT,
        **SIZE,
        num_inference_steps=3,
        guidance_scale=made.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(expected))
    # Of the base only configs and tokenizers came.
    asked = loopback_hub.requested_files()
    assert {path for path in asked if path.endswith(".safetensors")} == {FILE.replace(":", "/")}
    source = prepared.recipe.source
    assert source is not None
    assert (source.repo, source.licence) == ("someone/finetune", "openrail++")
    assert [part.partition("@")[0] for part in source.parts or ()] == [
        "someone/finetune",
        known.base,
    ]


def test_what_was_published_is_a_folder_that_stock_diffusers_loads(
    run: Prepare, tmp_path: Path
) -> None:
    source = small_sdxl(tmp_path / "source")
    file = write_single_file(source, tmp_path / "one.safetensors")

    prepared = run(file, name="me/one", base=str(source))

    pipeline = diffusers.DiffusionPipeline.from_pretrained(prepared.folder, local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        original = diffusers.DiffusionPipeline.from_pretrained(source, local_files_only=True)
        found = getattr(pipeline, name).state_dict()
        for key, value in getattr(original, name).state_dict().items():
            assert torch.equal(found[key], value), key


def test_only_the_header_is_read_for_a_plan(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path
) -> None:
    source = small_sdxl(tmp_path / "source")
    on_hub(tmp_path / "repo", loopback_hub, write_single_file(source, tmp_path / "one.safetensors"))
    loopback_hub.add(BASE, source)

    plan = make_plan(Request(FILE, hub=hub, folder=tmp_path / "prepared"))

    bodies = [
        request.range
        for request in loopback_hub.requests
        if request.method == "GET" and request.path.startswith("/lfs/")
    ]
    assert bodies
    assert set(bodies) <= {"bytes=0-100000"} or all(
        one and one.startswith("bytes=8-") for one in bodies[1:]
    )
    unet = next(component for component in plan.components if component.name == "unet")
    assert 0 < sum(unet.sizes) < (tmp_path / "one.safetensors").stat().st_size


def test_a_repos_own_configs_come_first_and_its_family_says_how_it_is_run(
    loopback_hub: LoopbackHub, run: Prepare, tmp_path: Path
) -> None:
    repo = small_sdxl(tmp_path / "source")
    write_single_file(repo, repo / "sd_xl_turbo_1.0.safetensors")
    loopback_hub.add("stabilityai/sdxl-turbo", repo)

    recipe = run("stabilityai/sdxl-turbo:sd_xl_turbo_1.0.safetensors").recipe

    assert (recipe.default_steps, recipe.guidance_free) == (1, True)
    assert recipe.source is not None
    assert len(recipe.source.parts or ()) == 1  # the repo itself was the base


@pytest.mark.parametrize("is_named", [True, False])
def test_a_file_that_is_of_no_repo_is_run_as_its_base_is(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path, is_named: bool
) -> None:
    if is_named:
        repo, source = "stabilityai/sdxl-turbo", small_sdxl(tmp_path / "source")
    else:  # known by its header
        repo = "stabilityai/stable-diffusion-3.5-large"
        source = write_small_sd3(tmp_path / "source", is_3_5_large=True)
    file = write_single_file(source, tmp_path / "one.safetensors")
    loopback_hub.add(repo, source)

    recipe = make_plan(
        Request(str(file), name="me/one", base=repo if is_named else None, hub=hub)
    ).recipe

    family = family_of(repo)
    assert family is not None
    assert (recipe.default_steps, recipe.guidance_scale, recipe.guidance_free) == (
        family.default_steps,
        family.guidance_scale,
        family.guidance_free,
    )


@pytest.mark.parametrize(
    ("file", "steps", "prediction"),
    [
        ("sdxl_lightning_4step.safetensors", 4, "epsilon"),
        ("sdxl_lightning_1step_x0.safetensors", 1, "sample"),
    ],
)
def test_lightnings_own_single_files_are_run_as_they_were_distilled(
    loopback_hub: LoopbackHub,
    run: Prepare,
    tmp_path: Path,
    file: str,
    steps: int,
    prediction: str,
) -> None:
    source = small_sdxl(tmp_path / "source")
    write_single_file(source, tmp_path / "lightning" / file)
    loopback_hub.add(LIGHTNING, tmp_path / "lightning")
    loopback_hub.add(BASE, source)

    prepared = run(f"{LIGHTNING}:{file}")

    assert (prepared.recipe.default_steps, prepared.recipe.guidance_free) == (steps, True)
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(prepared.folder / "scheduler")
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == prediction


def test_a_part_that_the_file_lacks_is_the_bases_own(run: Prepare, tmp_path: Path) -> None:
    base = small_sdxl(tmp_path / "base")
    finetune = small_sdxl(tmp_path / "finetune", seed=1)
    file = write_single_file(finetune, tmp_path / "one.safetensors", without=("vae",))

    prepared = run(file, name="me/one", base=str(base))

    made = prepared.folder
    name = "diffusion_pytorch_model.safetensors"
    assert (made / "vae" / name).read_bytes() == (base / "vae" / name).read_bytes()
    ours, theirs = (load_file(folder / "unet" / name) for folder in (made, finetune))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_what_sd3_can_do_without_is_left_out_when_the_file_lacks_it(
    run: Prepare, tmp_path: Path
) -> None:
    base = write_small_sd3(tmp_path / "base")
    file = write_single_file(base, tmp_path / "one.safetensors", without=("text_encoder_3",))

    prepared = run(file, name="me/one", base=str(base))

    assert not (prepared.folder / "text_encoder_3").exists()
    assert not (prepared.folder / "tokenizer_3").exists()


def test_what_sd3_can_do_without_is_left_out_when_the_base_lacks_it(
    run: Prepare, tmp_path: Path
) -> None:
    file = write_single_file(write_small_sd3(tmp_path / "source"), tmp_path / "one.safetensors")
    base = write_small_sd3(tmp_path / "base", with_t5=False)

    prepared = run(file, name="me/one", base=str(base))

    assert not (prepared.folder / "text_encoder_3").exists()
    index = json.loads((prepared.folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


def test_a_lora_merged_into_a_single_file_is_stocks(run: Prepare, tmp_path: Path) -> None:
    base = small_sdxl(tmp_path / "base")
    file = write_single_file(small_sdxl(tmp_path / "finetune", 1), tmp_path / "one.safetensors")
    lora = saved(deltas(weights_of(base, "unet", "text_encoder_2"), ("to_q", "q_proj")), tmp_path)
    options = Options(loras=(LoraName.parse(f"{lora / 'lora.safetensors'}@0.7"),))

    prepared = run(file, name="me/one", base=str(base), options=options)

    pipeline = stock(file, base)
    plain = picture(pipeline)
    pipeline.load_lora_weights(str(lora), weight_name="lora.safetensors", adapter_name="style")
    pipeline.set_adapters(["style"], [0.7])
    pipeline.fuse_lora(components=["unet", "text_encoder_2"])
    ours = diffusers.DiffusionPipeline.from_pretrained(prepared.folder, local_files_only=True)
    np.testing.assert_array_equal(picture(ours), picture(pipeline))
    assert not np.array_equal(picture(ours), plain)


@pytest.mark.parametrize(
    ("held", "asked", "expected"),
    [
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float8_e4m3fn, None, torch.float16),
    ],
)
def test_tensors_keep_their_dtype_unless_another_is_asked_for(
    run: Prepare, tmp_path: Path, held: torch.dtype, asked: Any, expected: torch.dtype
) -> None:
    base = small_sdxl(tmp_path / "base")
    file = write_single_file(base, tmp_path / "one.safetensors", dtype=held)

    prepared = run(file, name="me/one", base=str(base), options=Options(dtype=asked))

    assert f"torch.{prepared.recipe.dtype}" == str(expected)
    for component, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ):
        ours = load_file(prepared.folder / component / f"{stem}.safetensors")
        theirs = load_file(base / component / f"{stem}.safetensors")
        assert {value.dtype for value in ours.values()} == {expected}
        for key, value in theirs.items():
            assert torch.equal(ours[key], value.to(held).to(expected)), key


def test_a_single_file_is_split_into_shards(run: Prepare, tmp_path: Path) -> None:
    base = small_sdxl(tmp_path / "base")
    file = write_single_file(base, tmp_path / "one.safetensors")

    prepared = run(file, name="me/one", base=str(base), options=Options(max_shard_size=2_000_000))

    sizes = [one.stat().st_size for one in (prepared.folder / "unet").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 2_100_000
    unet = diffusers.UNet2DConditionModel.from_pretrained(prepared.folder / "unet")
    original = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    for key, value in original.state_dict().items():
        assert torch.equal(unet.state_dict()[key], value)
    assert not list(prepared.folder.glob(".unpacked*"))


def test_where_a_person_keeps_the_file_is_not_published(run: Prepare, tmp_path: Path) -> None:
    base = small_sdxl(tmp_path / "base")
    file = write_single_file(base, tmp_path / "private/one.safetensors")

    source = run(file, name="me/one", base=str(base)).recipe.source

    assert source is not None
    assert source.parts == ("one.safetensors", "base")
    assert source.repo is None


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (("v_pred",), {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
        (
            ("v_pred", "ztsnr"),
            {
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
)
def test_a_finetune_that_predicts_velocity_is_run_so(
    run: Prepare, tmp_path: Path, marks: tuple[str, ...], expected: dict[str, Any]
) -> None:
    base = small_sdxl(tmp_path / "base")
    extra = dict.fromkeys(marks, torch.empty(0))
    file = write_single_file(base, tmp_path / "one.safetensors", extra=extra)

    prepared = run(file, name="me/one", base=str(base))

    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(prepared.folder / "scheduler")
    assert {name: scheduler.config[name] for name in expected} == expected


def test_a_recipe_beside_the_file_says_how_it_is_run(run: Prepare, tmp_path: Path) -> None:
    base = write_small_sdxl(tmp_path / "base", text_2_layers=10)
    file = write_single_file(base, tmp_path / "mine/one.safetensors")
    (base / "recipe.json").rename(tmp_path / "mine/recipe.json")

    recipe = run(file, name="me/one", base=str(base)).recipe

    assert (recipe.default_steps, recipe.guidance_free) == (4, True)


def test_a_file_behind_a_link_keeps_its_name_and_its_neighbours(
    run: Prepare, tmp_path: Path
) -> None:
    folder = small_sdxl(tmp_path / "snapshots/main")  # as the Hub's cache has it
    blob = write_single_file(folder, tmp_path / "blobs/0123abcd")
    (folder / "one.safetensors").symlink_to(blob)

    source = run(folder / "one.safetensors", name="me/one").recipe.source

    assert source is not None
    assert source.parts == ("one.safetensors", "main")


def test_a_stray_tensor_of_another_precision_changes_nothing(run: Prepare, tmp_path: Path) -> None:
    base = small_sdxl(tmp_path / "base")
    extra = {"conditioner.embedders.1.model.logit_scale": torch.zeros(1)}
    file = write_single_file(base, tmp_path / "one.safetensors", dtype=torch.float16, extra=extra)

    prepared = run(file, name="me/one", base=str(base))

    tensors = load_file(prepared.folder / "text_encoder_2/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
