"""The model that everybody is measured with: SDXL's own dimensions or the demo's, random weights, a folder on disk.

`python -m benchmarks.generation.model JOB` writes it, in a process of its own so that no memory of the drawing is left.
It is a plain diffusers folder and, by its manifest, also one that was pulled from a bucket, which this product serves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.wire.memory import ROOT

Kind = Literal["small", "full"]

MODEL_PATH = "bench/sdxl"
SHARD_BYTES = 960_000_000  # as scripts/prepare_model.py splits what it publishes
SEED = 20261125
VOCABULARY = 49408  # CLIP's own; the small tokenizer uses the first few hundred


@dataclass(frozen=True)
class Job:
    """What all are asked to do: which model, where it lies, on which device, and how an image is made."""

    kind: Kind
    folder: str
    device: str
    dtype: str
    steps: int
    native_size: int
    # Environment variables of this product, beside those that say which model it is.
    settings: Mapping[str, str] = field(default_factory=dict)
    # More of them, which go through a contestant's environment alone: a command line is for everybody to read.
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def dump(self) -> str:
        """All but the secrets."""
        return json.dumps(asdict(replace(self, secrets={})))

    @classmethod
    def load(cls, text: str) -> Self:
        return cls(**json.loads(text))


def write_model(job: Job) -> int:
    """Write the job's folder, in a child process; returns the bytes of its weights."""
    command = [sys.executable, "-m", "benchmarks.generation.model", job.dump()]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return sum(file.stat().st_size for file in Path(job.folder).rglob("*.safetensors"))


def _write(job: Job) -> None:
    from demo.small_sdxl import lightning_recipe, write_sdxl, write_small_sdxl

    folder = Path(job.folder)
    dtype: Any = job.dtype
    if job.kind == "small":
        write_small_sdxl(
            folder, seed=SEED, dtype=dtype, steps=(job.steps,), native_size=job.native_size
        )
    else:
        write_sdxl(
            folder,
            full_dimensions(dtype),
            lightning_recipe(dtype, (job.steps,), job.native_size),
            seed=SEED,
            dtype=dtype,
            shard_bytes=SHARD_BYTES,
            numbers=_drawn_on(job.device),
        )
    _note_as_pulled(folder)


def _drawn_on(device: str) -> Any:
    """Billions of numbers in seconds; the same ones for a device, and nobody compares images between devices."""
    import torch

    generator = torch.Generator(device)

    def numbers(key: bytes, shape: Sequence[int]) -> torch.Tensor:
        generator.manual_seed(int.from_bytes(key[:7], "big"))
        return torch.rand(tuple(shape), generator=generator, device=device)

    return numbers


def full_dimensions(dtype: Any) -> Any:
    """Stable Diffusion XL base 1.0's: 2.6 billion parameters of UNet, text encoders of 12 and of 32 layers."""
    from demo.small_sdxl import Dimensions, text_config
    from demo.small_tokenizer import END

    text = text_config(
        dtype,
        pad_token=END,
        vocab_size=VOCABULARY,
        num_hidden_layers=12,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        architectures=["CLIPTextModel"],
    )
    text_2 = text_config(
        dtype,
        pad_token="!",  # noqa: S106 - a piece of text
        vocab_size=VOCABULARY,
        num_hidden_layers=32,
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        architectures=["CLIPTextModelWithProjection"],
    )
    unet = {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),  # diffusers' name for the number of heads
        "cross_attention_dim": 2048,
        "norm_num_groups": 32,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    vae = {
        "sample_size": 1024,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        # As madebyollin/sdxl-vae-fp16-fix has it, which prepare_model.py puts into SDXL-Lightning.
        "force_upcast": False,
    }
    return Dimensions(text, text_2, unet, vae)


def _note_as_pulled(folder: Path) -> None:
    from weights.folder import hash_folder
    from weights.manifest import MANIFEST_NAME, dump_manifest, make_manifest
    from weights.pulled import NOTE_NAME, Note, dump_note

    recipe = json.loads((folder / "recipe.json").read_text())
    manifest = make_manifest(hash_folder(folder), recipe)
    (folder / NOTE_NAME).write_bytes(dump_note(Note(MODEL_PATH, manifest.version, "bench")))
    (folder / MANIFEST_NAME).write_bytes(dump_manifest(manifest))


if __name__ == "__main__":
    _write(Job.load(sys.argv[1]))
