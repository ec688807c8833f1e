"""The small model: real classes, the same bytes every time, pictures that are pictures."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from demo.small_sdxl import write_small_sdxl
from diffusion.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT = "The space needle in Seattle, best quality, masterpiece"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stock_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    return pipeline


def paint(pipeline: Any, prompt: str, seed: int = 0, size: int = 256) -> np.ndarray:
    image = pipeline(
        prompt,
        width=size,
        height=size,
        num_inference_steps=4,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    return np.asarray(image, dtype=np.float32)


@pytest.fixture(scope="module")
def pipeline(small_sdxl: Path) -> Any:
    return stock_pipeline(small_sdxl)


@pytest.mark.slow
def test_same_seed_writes_same_bytes_in_another_process_with_other_threads(
    small_sdxl: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, pathlib, torch; torch.set_num_threads(3)\n"
        "from demo.small_sdxl import write_small_sdxl\n"
        "write_small_sdxl(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "again")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert digests(tmp_path / "again") == digests(small_sdxl)


def test_another_seed_changes_every_weight_file_and_no_config(
    small_sdxl: Path, tmp_path: Path
) -> None:
    first, other = digests(small_sdxl), digests(write_small_sdxl(tmp_path / "m", seed=1))
    changed = {path for path in first if first[path] != other[path]}
    assert changed == {path for path in first if path.endswith(".safetensors")}
    assert len(changed) == 4


def test_stock_diffusers_paints_a_picture_with_it(pipeline: Any) -> None:
    picture = paint(pipeline, PROMPT)
    assert picture.shape == (256, 256, 3)
    assert picture.std(axis=(0, 1)).min() > 20, "every colour channel varies"
    assert np.mean((picture == 0) | (picture == 255)) < 0.3, "most of it is not clipped"
    neighbours = np.abs(np.diff(picture, axis=1)).mean()
    assert neighbours < picture.std() / 5, "shapes, not grain"


def test_prompt_and_seed_both_change_the_picture(pipeline: Any) -> None:
    picture = paint(pipeline, PROMPT)
    for other in (paint(pipeline, "a red fox"), paint(pipeline, PROMPT, seed=1)):
        assert np.abs(picture - other).mean() > 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_paints_the_same_picture(pipeline: Any, tmp_path: Path, dtype: Any) -> None:
    half = stock_pipeline(write_small_sdxl(tmp_path / "half", dtype=dtype), getattr(torch, dtype))
    # 64 pixels: half precision on a CPU is very slow.
    pictures = [paint(model, PROMPT, size=64) for model in (half, pipeline)]
    difference = np.abs(pictures[0] - pictures[1]).mean()
    assert difference < 8


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_any_text_has_tokens(small_sdxl: Path, name: str, pad: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(small_sdxl / name)
    assert tokenizer.pad_token == pad
    for text in ("space needle", "日本の山 🎨", "żółw, \x07 naïve", "\U0010fffd"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_learned_words_are_few_tokens(small_sdxl: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(small_sdxl / "tokenizer")
    assert len(tokenizer("space needle", add_special_tokens=False).input_ids) <= 4


def test_large_files_are_split_as_the_hub_splits_them(pipeline: Any, tmp_path: Path) -> None:
    folder = write_small_sdxl(tmp_path / "split", shard_bytes=2_000_000)
    index = json.loads((folder / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {path.name for path in (folder / "unet").glob("*.safetensors")} == shards
    assert np.array_equal(paint(stock_pipeline(folder), PROMPT), paint(pipeline, PROMPT))


def test_recipe_says_how_a_few_step_model_wants_to_be_run(small_sdxl: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json((small_sdxl / "recipe.json").read_bytes())
    assert (recipe.steps, recipe.guidance_free, recipe.native_size) == ((4,), True, 256)
    assert recipe.scheduler.config["timestep_spacing"] == "trailing"

    plain = write_small_sdxl(tmp_path / "plain", lightning=False)
    assert not (plain / "recipe.json").exists()
