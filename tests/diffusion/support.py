"""What the tests of this room share: a small model's files as the weights room would hand them over."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from diffusion.build import build_pipeline
from diffusion.engine import Engine
from diffusion.fitting import Fit
from diffusion.recipe import Recipe, SchedulerRecipe

TRAILING = SchedulerRecipe(
    class_name="EulerDiscreteScheduler", config={"timestep_spacing": "trailing"}
)
LIGHTNING = Recipe(
    scheduler=TRAILING,
    dtype="float32",
    steps=(1, 2, 4),
    default_steps=4,
    guidance_scale=0.0,
    guidance_free=True,
    native_size=256,
)
GUIDED = Recipe(
    scheduler=TRAILING, dtype="float32", default_steps=3, guidance_scale=5.0, native_size=256
)


@dataclass(frozen=True)
class Tensor:
    """A landed tensor; the real one comes from `weights`, which this room does not import."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytearray | torch.Tensor


def read_configs(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_tensors(folder: Path) -> Iterator[Tensor]:
    """Every tensor of the folder, file by file, parsed from the safetensors format itself."""
    for path in sorted(folder.rglob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            file = path.relative_to(folder).as_posix()
            data = bytearray(content[first:last])
            yield Tensor(file, name, entry["dtype"], tuple(entry["shape"]), data)


def edited(configs: dict[str, bytes], path: str, **changes: object) -> dict[str, bytes]:
    """The same configs, with some entries of one of them changed."""
    config = json.loads(configs[path]) | changes
    return configs | {path: json.dumps(config).encode()}


def renamed(tensors: Iterable[Tensor], folder: str, old: str, new: str) -> Iterator[Tensor]:
    for tensor in tensors:
        inside = tensor.path.startswith(f"{folder}/")
        yield replace(tensor, name=tensor.name.replace(old, new)) if inside else tensor


def build(
    folder: Path,
    recipe: Recipe = LIGHTNING,
    *,
    configs: dict[str, bytes] | None = None,
    tensors: Iterable[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    fit: Fit | None = None,
) -> StableDiffusionXLPipeline:
    return build_pipeline(
        read_configs(folder) if configs is None else configs,
        read_tensors(folder) if tensors is None else tensors,
        recipe,
        device=torch.device(device),
        dtype=dtype,
        fit=fit,
    )


def build_engine(folder: Path, recipe: Recipe = LIGHTNING) -> Engine:
    return Engine(build(folder, recipe), recipe)


def stock_pipeline(
    folder: Path, dtype: torch.dtype = torch.float32, *, trailing: bool = True
) -> StableDiffusionXLPipeline:
    """The pipeline everybody gets from diffusers itself, set up as the model card of SDXL-Lightning says."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=dtype, local_files_only=True, add_watermarker=False
    )
    if trailing:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)
