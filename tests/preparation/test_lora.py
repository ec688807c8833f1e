"""LoRAs merged at preparation: the result is what stock loads, weighs and fuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from preparation import LoraName, Options, UsageError
from tests.preparation.conftest import BASE, FINETUNE, LIGHTNING, Models, Prepare
from tests.support.hub import LoopbackHub
from tests.support.small_families import stock_pipeline, write_small_sd3

STYLE = "someone/style-lora"
CALL = {"prompt": "a golden fox", "width": 64, "height": 64, "num_inference_steps": 2}


def deltas(
    files: dict[str, Path], targets: tuple[str, ...], *, rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A LoRA of random numbers for every matrix whose name ends in one of `targets`, in PEFT's own names."""
    generator = torch.Generator().manual_seed(seed)
    lora: dict[str, torch.Tensor] = {}
    for component, file in files.items():
        for name, weight in load_file(file).items():
            module = name.removesuffix(".weight")
            if weight.ndim == 2 and module.endswith(targets):
                place = f"{component}.{module}"
                rows, columns = weight.shape
                down = torch.randn(rank, columns, generator=generator)
                lora[f"{place}.lora_A.weight"] = down * 0.05
                lora[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    assert lora
    return lora


def in_kohyas_names(lora: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """The same LoRA as kohya's trainer writes it, and SDXL-Lightning is published: flat names and alphas."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in lora.items():
        component, _, rest = name.partition(".")
        module, _, side = rest.removesuffix(".weight").rpartition(".")
        flat = f"{prefixes[component]}_{module.replace('.', '_')}"
        renamed[f"{flat}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = tensor
        renamed[f"{flat}.alpha"] = torch.tensor(alpha)
    return renamed


def weights_of(folder: Path, *components: str) -> dict[str, Path]:
    return {name: next((folder / name).glob("*.safetensors")) for name in components}


@pytest.fixture
def style(models: Models, tmp_path: Path) -> Path:
    """A LoRA of the UNet and both text encoders."""
    files = weights_of(models.full, "unet", "text_encoder", "text_encoder_2")
    lora = deltas(files, ("to_q", "to_v", "to_out.0", "ff.net.2", "q_proj", "out_proj"))
    return saved(lora, tmp_path / "style")


def saved(lora: dict[str, torch.Tensor], folder: Path, name: str = "lora.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / name, metadata={"format": "pt"})
    return folder


def picture(pipeline: Any, **call: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    # torch multiplies a batch in another way, with other rounding, where a weight asks for gradients; PEFT leaves those
    # it has changed without.
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(3)
    return np.asarray(pipeline(**CALL | call, generator=generator).images[0])


def fused_by_stock(folder: Path, *loras: tuple[Path, float]) -> Any:
    pipeline = stock_pipeline(folder)
    names = [f"lora-{number}" for number in range(len(loras))]
    for name, (lora, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(lora), weight_name="lora.safetensors", adapter_name=name)
    pipeline.set_adapters(names, [weight for _, weight in loras])
    parts = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None)]
    pipeline.fuse_lora(components=parts)
    return pipeline


def with_loras(*names: str) -> Options:
    return Options(loras=tuple(LoraName.parse(name) for name in names))


def test_a_merged_lora_gives_the_pixels_of_stocks_load_and_fuse(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, style: Path
) -> None:
    loopback_hub.add(STYLE, style)

    prepared = run(models.full, name="me/styled", options=with_loras(f"{STYLE}@0.7"))

    ours = stock_pipeline(prepared.folder)
    stock = fused_by_stock(models.full, (style, 0.7))
    plain = stock_pipeline(models.full)
    np.testing.assert_array_equal(picture(ours), picture(stock))
    assert not np.array_equal(picture(ours), picture(plain))


def test_several_loras_are_merged_in_order_each_with_its_weight(
    run: Prepare, models: Models, style: Path, tmp_path: Path
) -> None:
    other = deltas(weights_of(models.full, "unet"), ("to_q", "to_k"), rank=2, seed=1)
    second = saved(other, tmp_path / "second")

    names = (f"{style}/lora.safetensors@0.5", f"{second}/lora.safetensors@-1.25")
    prepared = run(models.full, name="me/styled", options=with_loras(*names))

    ours = stock_pipeline(prepared.folder)
    stock = fused_by_stock(models.full, (style, 0.5), (second, -1.25))
    np.testing.assert_array_equal(picture(ours), picture(stock))


def test_kohyas_names_and_alphas_are_understood(
    run: Prepare, models: Models, style: Path, tmp_path: Path
) -> None:
    lora = deltas(weights_of(models.full, "unet"), ("to_q", "to_out.0"))
    kohya = saved(in_kohyas_names(lora, alpha=2.0), tmp_path / "kohya")

    options = with_loras(f"{kohya}/lora.safetensors")
    prepared = run(models.full, name="me/styled", options=options)

    ours = stock_pipeline(prepared.folder)
    stock = fused_by_stock(models.full, (kohya, 1.0))
    np.testing.assert_array_equal(picture(ours), picture(stock))


def test_stable_diffusion_3_takes_loras_too(run: Prepare, tmp_path: Path) -> None:
    model = write_small_sd3(tmp_path / "sd3", with_t5=False)
    lora = saved(deltas(weights_of(model, "transformer"), ("to_q", "to_v")), tmp_path / "lora")

    options = with_loras(f"{lora}/lora.safetensors@0.9")
    prepared = run(model, name="me/styled", options=options)

    ours = stock_pipeline(prepared.folder)
    stock = fused_by_stock(model, (lora, 0.9))
    np.testing.assert_array_equal(picture(ours), picture(stock))


def test_only_what_a_lora_changes_is_written_anew(
    run: Prepare, models: Models, tmp_path: Path
) -> None:
    lora = saved(deltas(weights_of(models.full, "unet"), ("to_q",)), tmp_path / "lora")

    options = with_loras(f"{lora}/lora.safetensors")
    prepared = run(models.full, name="me/styled", options=options)

    for component, file in weights_of(models.full, "vae", "text_encoder").items():
        assert (prepared.folder / component / file.name).read_bytes() == file.read_bytes()
    (unet,) = weights_of(models.full, "unet").values()
    before, after = load_file(unet), load_file(prepared.folder / "unet" / unet.name)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("to_q.weight")}
    assert list(after) == list(before)


def test_what_else_lies_beside_a_lora_does_not_matter(
    run: Prepare, models: Models, style: Path, tmp_path: Path
) -> None:
    (style / "elsewhere").symlink_to("/usr")
    odd = style.rename(tmp_path / "me@work")

    options = with_loras(f"{odd}/lora.safetensors")
    source = run(models.full, name="me/styled", options=options).recipe.source

    assert source is not None
    assert source.parts == ("lora.safetensors x 1",)
    assert options.recorded() == {"lora": ["lora.safetensors"]}


def test_position_ids_of_older_files_stay_as_they_are(
    run: Prepare, models: Models, own: Callable[[Path], Path], style: Path
) -> None:
    folder = own(models.full)
    (file,) = weights_of(folder, "text_encoder").values()
    name = "text_model.embeddings.position_ids"
    ids = torch.arange(77).unsqueeze(0)
    save_file(load_file(file) | {name: ids}, file, metadata={"format": "pt"})

    options = with_loras(f"{style}/lora.safetensors")
    prepared = run(folder, name="me/styled", options=options)

    assert load_file(prepared.folder / "text_encoder" / file.name)[name].equal(ids)


def test_the_lora_is_recorded_with_its_commit_and_weight(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, style: Path
) -> None:
    model = loopback_hub.add(FINETUNE, models.finetune)
    commit = loopback_hub.add(STYLE, style)

    source = run(FINETUNE, name="me/styled", options=with_loras(f"{STYLE}@0.7")).recipe.source

    assert source is not None
    assert source.parts == (f"{FINETUNE}@{model}", f"{STYLE}@{commit}:lora.safetensors x 0.7")


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_lightning_steps_make_any_finetune_a_few_step_model(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path, steps: int
) -> None:
    lora = in_kohyas_names(deltas(weights_of(models.full, "unet"), ("to_q", "to_k")), alpha=4.0)
    name = f"sdxl_lightning_{steps}step_lora.safetensors"
    loopback_hub.add(LIGHTNING, saved(lora, tmp_path / "lightning", name))
    loopback_hub.add(FINETUNE, models.finetune)

    prepared = run(FINETUNE, name="me/fast", options=Options(lightning_steps=steps))

    recipe = prepared.recipe
    assert (recipe.steps, recipe.default_steps, recipe.guidance_free) == ((steps,), steps, True)
    ours = stock_pipeline(prepared.folder)
    assert ours.scheduler.config.timestep_spacing == "trailing"
    stock_lora = saved(lora, tmp_path / "stock")
    stock = fused_by_stock(models.full, (stock_lora, 1.0))
    stock.scheduler = EulerDiscreteScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing"
    )
    call = {"num_inference_steps": steps, "guidance_scale": 0.0}
    np.testing.assert_array_equal(picture(ours, **call), picture(stock, **call))


def test_the_lightning_repo_itself_is_published_for_as_many_steps_as_asked(
    lightning_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path
) -> None:
    one_step = tmp_path / "lightning"
    one_step.mkdir()
    unet = load_file(models.other_half / "unet/diffusion_pytorch_model.safetensors")
    save_file(unet, one_step / "sdxl_lightning_1step_unet_x0.safetensors")
    lightning_hub.add(LIGHTNING, one_step)

    prepared = run(LIGHTNING, options=Options(lightning_steps=1))

    assert prepared.recipe.steps == (1,)
    ours = stock_pipeline(prepared.folder)
    assert ours.scheduler.config.prediction_type == "sample"
    assert ours.scheduler.config.timestep_spacing == "trailing"
    for name, tensor in ours.unet.state_dict().items():
        assert tensor.equal(unet[name].to(tensor.dtype)), name


Spoil = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda lora: {
                name: tensor[:, :-8] if "lora_A" in name else tensor
                for name, tensor in lora.items()
            },
            "does not fit unet of .*Is it a LoRA for another kind of model",
        ),
        (
            lambda lora: {name.replace("unet.", "unet.elsewhere."): t for name, t in lora.items()},
            "does not fit unet of .*Is it a LoRA for another kind of model",
        ),
        (
            lambda lora: {name.replace("unet.", "transformer."): t for name, t in lora.items()},
            "which is no part of a StableDiffusionXLPipeline",
        ),
        (lambda lora: {"weight": next(iter(lora.values()))}, "is no LoRA: none of its 1 tensors"),
    ],
    ids=["shape", "module", "component", "none"],
)
def test_a_lora_of_another_architecture_is_refused(
    run: Prepare, models: Models, tmp_path: Path, spoil: Spoil, says: str
) -> None:
    lora = deltas(weights_of(models.full, "unet"), ("attn2.to_k",))
    spoiled = {name: tensor.contiguous() for name, tensor in spoil(lora).items()}
    file = saved(spoiled, tmp_path / "lora")

    with pytest.raises(UsageError, match=says):
        run(models.full, name="me/styled", options=with_loras(f"{file}/lora.safetensors"))

    assert not (tmp_path / "prepared" / "me--styled").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            f"{STYLE}:other.safetensors",
            "has no file other.safetensors. It has a.safetensors, b.saf",
        ),
        (STYLE, f"has several safetensors files .*for example --lora {STYLE}:a.safetensors"),
        (f"{STYLE}:c.bin", "c.bin is no safetensors file"),
        ("./nothing.safetensors", "there is no file nothing.safetensors"),
    ],
)
def test_a_lora_that_cannot_be_told_is_asked_for_again(
    loopback_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path, name: str, says: str
) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    for file in ("a.safetensors", "b.safetensors", "c.bin"):
        (repo / file).write_bytes(b"x")
    loopback_hub.add(STYLE, repo)

    with pytest.raises(UsageError, match=says):
        run(models.full, name="me/styled", options=with_loras(name))


@pytest.mark.parametrize("text", ["a/b@", "a/b@x", "a/b@0", "a/b@nan", ":file", "@0.5", ""])
def test_a_name_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lora"):
        LoraName.parse(text)


def test_few_steps_cannot_be_had_twice_or_of_another_pipeline(
    lightning_hub: LoopbackHub, run: Prepare, models: Models, tmp_path: Path
) -> None:
    lightning_hub.add("stabilityai/sdxl-turbo", models.finetune)
    with pytest.raises(UsageError, match="was already distilled, for 1 steps"):
        run("stabilityai/sdxl-turbo", options=Options(lightning_steps=4))
    with pytest.raises(UsageError, match="--lightning-steps 1 has no LoRA"):
        run(BASE, options=Options(lightning_steps=1))
    model = write_small_sd3(tmp_path / "sd3", with_t5=False)
    with pytest.raises(UsageError, match="is a StableDiffusion3Pipeline"):
        run(model, name="me/x", options=Options(lightning_steps=4))
