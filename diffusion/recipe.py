"""How a checkpoint wants to be run: scheduler, steps, guidance, native size, and where it came from.

A recipe travels as plain JSON in the manifest, or is read from a diffusers folder's own configs. Imports no torch.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from diffusion.errors import ModelError
from diffusion.families import ARCHITECTURES, Architecture, Family

SDXL = ARCHITECTURES["StableDiffusionXLPipeline"]

MAX_STEPS = 50

# A closed list, because a config must never choose what gets imported. Left out are the schedulers that need packages
# this product does not install (LMS wants scipy, DPM-Solver SDE wants torchsde).
SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)

Dtype = Literal["float16", "bfloat16", "float32"]


class _Frozen(BaseModel):
    # An unknown field may change what the images look like, so it is refused rather than dropped.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Frozen):
    """Where the weights came from, for provenance and licence.

    `parts` names, as "owner/name@commit", every repo of a model that was put together from several. `allow` and
    `ignore` are the patterns that left a part of the source out; a source taken as it is does not mention them, so
    that its version keeps the name it had before there were any.
    """

    repo: str | None = None
    revision: str | None = None
    licence: str | None = None
    parts: tuple[str, ...] | None = None
    allow: tuple[str, ...] | None = Field(default=None, exclude_if=lambda value: value is None)
    ignore: tuple[str, ...] | None = Field(default=None, exclude_if=lambda value: value is None)


class SchedulerRecipe(_Frozen):
    """A diffusers scheduler class, and what to set over the folder's own `scheduler_config.json`."""

    class_name: str
    config: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _class_is_known(self) -> Self:
        if self.class_name not in SCHEDULERS:
            raise ValueError(
                f"scheduler {self.class_name!r} is not supported; use one of {_listed(SCHEDULERS)}"
            )
        return self


def _known_pipeline(name: str) -> str:
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} cannot be served; these can: {_listed(ARCHITECTURES)}")
    return name


class Recipe(_Frozen):
    """What the engine needs to know about a checkpoint that its tensors do not say.

    What is left open is what the pipeline's own `__call__` does when its caller says nothing. A checkpoint that wants
    otherwise says so nowhere in its configs, so a mirrored model starts from what its users get from stock diffusers.
    `steps` lists the only step counts a distilled checkpoint can do; None means any from 1 to `MAX_STEPS`.
    `guidance_free` checkpoints were distilled without classifier-free guidance and always run at `guidance_scale`.
    `native_size` is the edge, in pixels, of the square the checkpoint was trained on.
    `vae_overflows`: in float16 the VAE's decoder passes that type's largest number, and the pipeline's class heeds no
    mark of it in the VAE's config, as SDXL's does. In float16 it is run in float32. Like the patterns in `Source` it is
    only mentioned where there is something to say.
    Anything wrong, here or in `model_validate`, raises `ModelError`.
    """

    pipeline: Annotated[str, AfterValidator(_known_pipeline)] = SDXL.pipeline
    scheduler: SchedulerRecipe
    dtype: Dtype
    steps: tuple[int, ...] | None = None
    default_steps: int = SDXL.default_steps
    guidance_scale: float = Field(default=SDXL.guidance_scale, ge=0)
    guidance_free: bool = False
    native_size: int = Field(ge=32, le=4096, multiple_of=8)
    vae_overflows: bool = Field(default=False, exclude_if=lambda value: not value)
    source: Source | None = None

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        name = data.get("pipeline") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            return data
        own = ARCHITECTURES[name]
        defaults = {"default_steps": own.default_steps, "guidance_scale": own.guidance_scale}
        return defaults | data

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.pipeline]

    def as_family(self, family: Family) -> Self:
        """The same checkpoint, run as its authors run theirs. Raises `ModelError` for another pipeline's family."""
        if family.pipeline != self.pipeline:
            raise ModelError(
                f"The model is a {self.pipeline}, but {family.name} is a {family.pipeline}. Has the repo changed?"
            )
        return self.model_copy(
            update={
                "steps": family.steps,
                "default_steps": family.default_steps,
                "guidance_scale": family.guidance_scale,
                "guidance_free": family.guidance_free,
            }
        )

    @model_validator(mode="after")
    def _steps_make_sense(self) -> Self:
        allowed = self.steps if self.steps is not None else range(1, MAX_STEPS + 1)
        if self.steps is not None and (
            not self.steps or not all(1 <= count <= MAX_STEPS for count in self.steps)
        ):
            raise ValueError(f"steps {list(self.steps)} must name counts from 1 to {MAX_STEPS}")
        if self.default_steps not in allowed:
            raise ValueError(
                f"default_steps {self.default_steps} is not a step count this recipe allows"
            )
        if self.guidance_free and self.guidance_scale > 1:
            raise ValueError(
                f"guidance_scale {self.guidance_scale} switches guidance on, but guidance_free says it is off"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _speak_plainly(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise ModelError(
                f"The model's recipe is not valid: {_reasons(error)}. Correct it and publish the model again."
            ) from error

    @classmethod
    def from_configs(cls, configs: Mapping[str, bytes]) -> "Recipe":
        """The recipe of a plain diffusers folder, from its config files by path.

        Raises `ModelError` when a file is missing, is not JSON, or describes a kind of model that cannot be served.
        """
        index = read_config(configs, "model_index.json")
        name = index.get("_class_name")
        architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
        if architecture is None:
            raise ModelError(
                f"This model is a {name or 'folder of no known pipeline'}, as its model_index.json says; only "
                f"{_listed(ARCHITECTURES)} can be served. Publish one of these."
            )
        scheduler = read_config(configs, "scheduler/scheduler_config.json")
        text_encoder = read_config(configs, "text_encoder/config.json")
        return cls.model_validate(
            {
                "pipeline": architecture.pipeline,
                "scheduler": {
                    "class_name": scheduler.get("_class_name"),
                    "config": {
                        name: value for name, value in scheduler.items() if not name.startswith("_")
                    },
                },
                "dtype": _saved_dtype(text_encoder),
                "native_size": _native_size(configs, architecture.denoiser),
            }
        )


def lightning_recipe(
    steps: Literal[1, 2, 4, 8] = 4, *, dtype: Dtype = "float16", source: Source | None = None
) -> Recipe:
    """The recipe of SDXL-Lightning (https://huggingface.co/ByteDance/SDXL-Lightning, arXiv 2402.13929).

    Trailing timesteps, since the distillation ends at pure noise: SDXL's own "leading" would give wrong images without
    an error. No guidance: it was distilled in. The 1-step checkpoint predicts the image instead of the noise.
    """
    if steps not in (1, 2, 4, 8):
        raise ModelError(f"SDXL-Lightning has checkpoints for 1, 2, 4 and 8 steps, not {steps}.")
    config = {"timestep_spacing": "trailing"}
    if steps == 1:
        config["prediction_type"] = "sample"
    return Recipe(
        scheduler=SchedulerRecipe(class_name="EulerDiscreteScheduler", config=config),
        dtype=dtype,
        steps=(steps,),
        default_steps=steps,
        guidance_scale=0.0,
        guidance_free=True,
        native_size=1024,
        source=source,
    )


def read_config(configs: Mapping[str, bytes], path: str) -> dict[str, Any]:
    """One JSON object among a model's config files; raises `ModelError` naming the file."""
    if path not in configs:
        raise ModelError(f"The model has no {path}; publish a complete diffusers folder.")
    try:
        config = json.loads(configs[path])
    except ValueError as error:
        raise ModelError(f"{path} of the model is not JSON ({error}); publish it again.") from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path} of the model holds a JSON {type(config).__name__}, not an object."
        )
    return config


def _saved_dtype(text_encoder: Mapping[str, Any]) -> Dtype:
    """Only transformers notes the dtype its files were saved in, under either of two names."""
    saved = text_encoder.get("dtype") or text_encoder.get("torch_dtype")
    return next((dtype for dtype in get_args(Dtype) if dtype == saved), "float32")


def _native_size(configs: Mapping[str, bytes], denoiser: str) -> int:
    """The denoiser's latents, in pixels: the VAE halves the image once per block after the first."""
    sample_size = read_config(configs, f"{denoiser}/config.json").get("sample_size")
    if isinstance(sample_size, list) and len(set(sample_size)) == 1:
        sample_size = sample_size[0]
    if not isinstance(sample_size, int):
        raise ModelError(
            f"{denoiser}/config.json of the model gives sample_size {sample_size!r}, so its native size is unknown; "
            "it should be one number, 128 for SDXL."
        )
    blocks = read_config(configs, "vae/config.json").get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise ModelError(
            f"vae/config.json of the model gives block_out_channels {blocks!r}, so the size of its latents is unknown."
        )
    return int(sample_size * 2 ** (len(blocks) - 1))


def _reasons(error: ValidationError) -> str:
    def reason(line: Any) -> str:
        where = ".".join(str(part) for part in line["loc"])
        what = line["msg"].removeprefix("Value error, ")
        return f"{where}: {what}" if where else what

    return "; ".join(reason(line) for line in error.errors(include_url=False))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
