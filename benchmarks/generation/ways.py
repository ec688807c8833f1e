"""Who makes images: this engine, stock diffusers as it is and compiled, and what others make of its pipeline.

Each is prepared in a process of its own, from the same folder; a way that cannot be had raises, and the report says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.generation.model import MODEL_PATH, Job

OURS = "ours"
STOCK = "eager"
COMPILED = ("compile", "compile-max")
# This engine's contestants in the part about cold starts.
UNCOMPILED = "COMPILE=off"
PUBLISHED = "published code"
COMPILING = "COMPILE=on, nothing published"

Device = Literal["cpu", "cuda"]


class NotHereError(Exception):
    """This way cannot be measured here."""


@dataclass(frozen=True)
class Made:
    """One image; the device's seconds for it where they are known, and those of its stages where somebody says."""

    image: Any
    device_seconds: float | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


Generate = Callable[[str, int, int], Made]
"""A prompt, a seed and the edge of a square to an image."""


def ours(job: Job) -> Generate:
    """As the container does it: `loading.load` with the environment's settings, and what nobody sets left alone."""
    from loading import load
    from settings import load_runner_settings
    from weights.waterfall import ColdStart

    environment = {
        "MODEL_PATH": MODEL_PATH,
        "MODEL_FOLDER": job.folder,
        "PUBLIC_BUCKET_NAME": "generated-images",
        "DEVICE": job.device,
        "DTYPE": job.dtype,
    }
    # Only the bucket's, and only where the job had them: see `Job.secrets`.
    bucket_s = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings = load_runner_settings(environment | bucket_s | dict(job.settings))
    return Ours(load(settings, ColdStart(), meanwhile=lambda: None), job)


class Ours:
    """This engine as a `Generate`, with what only it can do."""

    def __init__(self, engine: Any, job: Job) -> None:
        self._engine = engine
        self._job = job

    def __call__(self, prompt: str, seed: int, size: int, model: str | None = None) -> Made:
        from diffusion.request import GenerationRequest

        request = GenerationRequest(prompt=prompt, width=size, height=size, seed=seed, model=model)
        (made,) = self._engine.generate(request)
        stages = sum(made.timings[stage] for stage in ("prompt", "denoise", "decode"))
        return Made(made.image, stages, made.timings)

    def settle(self) -> None:
        """Wait for what it makes ready beside requests, which would fall into other ways' measurements."""
        for done in self._engine.getting_ready:
            done.exception()

    def await_compiled(self, size: int) -> float:
        """When (`time.monotonic()`) it was seen that the size runs compiled, or that it never will."""
        while (size, size) not in self._engine.compiled and self._engine.getting_ready:
            time.sleep(0.01)
        return time.monotonic()

    def compiled(self) -> list[tuple[int, int]]:
        """Width and height of what runs compiled."""
        return sorted(self._engine.compiled)

    def add_second_model(self, name: str) -> None:
        """Have it serve a second model of the same size, of which no tensor is the first one's."""
        from loading import on_a_passing_thread

        on_a_passing_thread(lambda: self._add_second_model(name))

    def _add_second_model(self, name: str) -> None:
        import torch

        from diffusion.recipe import Recipe
        from diffusion.refresh import stage
        from weights import ReadOptions, open_model

        options = ReadOptions(folder=Path(self._job.folder))
        with open_model(None, MODEL_PATH, None, options=options) as stream:
            recipe = Recipe.model_validate(stream.recipe)
            staged = stage(stream.configs(), stream.tensors(), recipe, stream.version)
        with torch.no_grad():
            for part in recipe.architecture.modules:
                for parameter in getattr(staged.pipeline, part).parameters():
                    parameter.mul_(1.01)
        self._engine.add_model(name, staged)


def eager(job: Job) -> Generate:
    """Stock `StableDiffusionXLPipeline`, set up as SDXL-Lightning's model card says."""
    return _calling(_stock(job), job)


def compile_unet(job: Job) -> Generate:
    """The UNet through `torch.compile` with its defaults, every size compiled for itself."""
    import torch

    pipeline = _stock(job)
    pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
    return _calling(pipeline, job)


def compile_most(job: Job) -> Generate:
    """All that diffusers' guide to speed advises and that leaves the arithmetic alone, with autotuning."""
    import torch

    pipeline = _stock(job)
    pipeline.fuse_qkv_projections()
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    chosen: Any = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
    pipeline.unet = torch.compile(pipeline.unet, **chosen)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, **chosen)
    return _calling(pipeline, job)


def openvino(job: Job) -> Generate:
    """UNet and decoder as OpenVINO models in float32, one for every size; the rest is stock's."""
    from benchmarks.generation.openvino_parts import replace_parts

    pipeline = _stock(job)
    replace_parts(pipeline)
    return _calling(pipeline, job)


def torchao_float8(job: Job) -> Generate:
    """Linear layers of the UNet in float8, scaled as they run, and then `torch.compile` with its defaults."""
    import torch
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    if torch.cuda.get_device_capability() < (8, 9):
        raise NotHereError("this card has no float8 arithmetic")
    pipeline = _stock(job)
    quantize_(pipeline.unet, Float8DynamicActivationFloat8WeightConfig())
    pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
    return _calling(pipeline, job)


@dataclass(frozen=True)
class Way:
    """`only` is the one kind of device on which it makes sense."""

    name: str
    prepare: Callable[[Job], Generate]
    only: Device | None = None


WAYS: dict[str, Way] = {
    OURS: Way("this engine", ours),
    STOCK: Way("stock diffusers", eager),
    "compile": Way("stock, torch.compile", compile_unet),
    "compile-max": Way("stock, torch.compile max-autotune", compile_most, only="cuda"),
    "openvino": Way("stock, OpenVINO", openvino, only="cpu"),
    "torchao": Way("stock, torchao float8 and torch.compile", torchao_float8, only="cuda"),
}

# What was looked at and is not among them (November 2026, beside torch 2.13 and diffusers 0.42).
NOT_MEASURED = {
    "stable-fast 1.0": "has no wheel on PyPI, and its source does not build where pip builds, without torch in sight",
    "OneDiff 1.2": "its compilers are OneFlow and Nexfort 0.1, whose wheel wants torch 2.5.1",
    "optimum-intel 2.2": (
        "replaces transformers by 5.5 and huggingface_hub by 1.21. What it runs is OpenVINO, which is measured"
    ),
    "SGLang 0.5.23, vLLM-Omni 0.30": (
        "servers of their own, which bring torch 2.14.1 and an older transformers: nothing of theirs can run in the "
        "same environment"
    ),
    "Torch-TensorRT": "its package on PyPI asks for an NVIDIA driver before it lets itself be installed",
    "Intel Extension for PyTorch 2.8": "is for torch 2.8, and was not continued",
    "xFuser 0.7": "spreads one image over several cards, and there is one",
    "Cache-DiT 1.5, ParaAttention 0.3": "are for transformers, and SDXL's denoiser is a UNet",
    "DeepCache 0.1.1": (
        "computes parts of the UNet in some steps only: other images, and with 4 steps nothing that could be left out"
    ),
}


def ways_for(device: str, names: list[str] | None) -> list[str]:
    """The ways to measure on that kind of device, of `names` if there are any."""
    return [
        name
        for name, way in WAYS.items()
        if (name in names if names else way.only in (None, device))
    ]


def _stock(job: Job) -> Any:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        job.folder,
        dtype=getattr(torch, job.dtype),
        local_files_only=True,
        use_safetensors=True,
        add_watermarker=False,
    ).to(job.device)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _calling(pipeline: Any, job: Job) -> Generate:
    """The pipeline's own call, from a prompt to a Pillow image, timed on the device as well where that is a card."""
    import torch

    def call(prompt: str, seed: int, size: int) -> Any:
        return pipeline(
            prompt=prompt,
            width=size,
            height=size,
            num_inference_steps=job.steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]

    def on_cpu(prompt: str, seed: int, size: int) -> Made:
        started = time.perf_counter()
        image = call(prompt, seed, size)
        return Made(image, time.perf_counter() - started)

    def on_card(prompt: str, seed: int, size: int) -> Made:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        image = call(prompt, seed, size)
        marks[1].record()
        marks[1].synchronize()
        return Made(image, marks[0].elapsed_time(marks[1]) / 1000)

    return on_card if job.device == "cuda" else on_cpu
