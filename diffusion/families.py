"""What can be served: diffusers' pipeline classes, and the checkpoints that want to be run in a way of their own.

To add a family, add its entry here: an `Architecture` where the pipeline class is new, a `Family` where a checkpoint
wants other steps or guidance than its pipeline's defaults. Nothing else names one. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Class = tuple[str, str]  # library and name, as model_index.json has them


@dataclass(frozen=True)
class Tokenizer:
    """Reads prompts for the text encoder named `encoder`.

    `max_tokens` is where the pipeline cuts a prompt whose encoder sets no limit of its own.
    """

    encoder: str
    kind: str = "CLIPTokenizer"
    max_tokens: int | None = None


@dataclass(frozen=True)
class SingleFile:
    """How the authors' own single-file checkpoints of an architecture are recognised and laid out.

    `kinds` are diffusers' names for them (`infer_diffusers_model_type`); `prefixes` say how the names of each
    module's tensors begin.
    """

    kinds: tuple[str, ...]
    prefixes: Mapping[str, str]


@dataclass(frozen=True)
class Architecture:
    """A pipeline class of diffusers: what it is made of, and what its `__call__` does when its caller says nothing.

    `embeddings` names what its `encode_prompt` returns, as `__call__` takes it; `further_prompts` are arguments of
    `encode_prompt` for encoders that could read another prompt, and here read the same. Parts in `optional` may be
    missing. `tiny_vae` is the Hub repo of one that decodes the same latents, for previews. `upcasts_vae`: in float16
    it decodes in float32 where the VAE's config says `force_upcast`. `attends_to` says which of CLIP's hidden states
    its denoiser attends to, where it attends to nothing else: such prompts can have weights, and be longer than CLIP
    reads at once.
    """

    pipeline: str
    denoiser: str
    modules: Mapping[str, Class]
    tokenizers: Mapping[str, Tokenizer]
    embeddings: tuple[str, ...]
    default_steps: int
    guidance_scale: float
    single_file: SingleFile
    tiny_vae: str
    further_prompts: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    upcasts_vae: bool = False
    attends_to: Literal["last", "penultimate"] | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)  # of the class, always the same
    settings: Mapping[str, object] = field(default_factory=dict)  # from model_index.json: defaults

    @property
    def components(self) -> tuple[str, ...]:
        """Everything a text-to-image folder of it has to hold, in the order of their names."""
        return tuple(sorted({"scheduler", *self.modules, *self.tokenizers}))


@dataclass(frozen=True)
class Family:
    """Checkpoints that all want to be run in the same way, by the Hub repos they come from.

    `steps` lists the only step counts a distilled checkpoint can do; None means any.
    """

    name: str
    pipeline: str
    repos: tuple[str, ...]
    default_steps: int
    guidance_scale: float
    steps: tuple[int, ...] | None = None
    guidance_free: bool = False


# Beside a pipeline's components and no part of it: a tiny VAE in a folder of its own, for pictures on the way. Stock
# diffusers, which goes by model_index.json, does not see it.
PREVIEW_VAE: Final = "preview_vae"
PREVIEW_VAE_CLASS: Final = ("diffusers", "AutoencoderTiny")

_UNET: Final = ("diffusers", "UNet2DConditionModel")
_VAE: Final = ("diffusers", "AutoencoderKL")
_CLIP: Final = ("transformers", "CLIPTextModel")
_CLIP_WITH_PROJECTION: Final = ("transformers", "CLIPTextModelWithProjection")
_WITH_POOLED: Final = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)

_ARCHITECTURES = (
    Architecture(
        "StableDiffusionXLPipeline",
        denoiser="unet",
        modules={
            "text_encoder": _CLIP,
            "text_encoder_2": _CLIP_WITH_PROJECTION,
            "unet": _UNET,
            "vae": _VAE,
        },
        tokenizers={
            "tokenizer": Tokenizer("text_encoder"),
            "tokenizer_2": Tokenizer("text_encoder_2"),
        },
        embeddings=_WITH_POOLED,
        default_steps=50,
        guidance_scale=5.0,
        single_file=SingleFile(
            ("xl_base",),
            {
                "text_encoder": "conditioner.embedders.0.",
                "text_encoder_2": "conditioner.embedders.1.",
                "unet": "model.diffusion_model.",
                "vae": "first_stage_model.",
            },
        ),
        tiny_vae="madebyollin/taesdxl",
        upcasts_vae=True,
        attends_to="penultimate",
        # diffusers would mark every image where invisible-watermark happens to be installed.
        arguments={"add_watermarker": False},
        settings={"force_zeros_for_empty_prompt": True},
    ),
    Architecture(
        "StableDiffusionPipeline",
        denoiser="unet",
        modules={"text_encoder": _CLIP, "unet": _UNET, "vae": _VAE},
        tokenizers={"tokenizer": Tokenizer("text_encoder")},
        embeddings=_WITH_POOLED[:2],
        default_steps=50,
        guidance_scale=7.5,
        single_file=SingleFile(
            ("v1", "v2"),
            {
                "text_encoder": "cond_stage_model.",
                "unet": "model.diffusion_model.",
                "vae": "first_stage_model.",
            },
        ),
        tiny_vae="madebyollin/taesd",
        attends_to="last",
        # What a caller may see is the owner's business, as it is for every other pipeline.
        arguments={
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    ),
    Architecture(
        "StableDiffusion3Pipeline",
        denoiser="transformer",
        modules={
            "text_encoder": _CLIP_WITH_PROJECTION,
            "text_encoder_2": _CLIP_WITH_PROJECTION,
            "text_encoder_3": ("transformers", "T5EncoderModel"),
            "transformer": ("diffusers", "SD3Transformer2DModel"),
            "vae": _VAE,
        },
        tokenizers={
            "tokenizer": Tokenizer("text_encoder"),
            "tokenizer_2": Tokenizer("text_encoder_2"),
            "tokenizer_3": Tokenizer("text_encoder_3", "T5Tokenizer", max_tokens=256),
        },
        embeddings=_WITH_POOLED,
        further_prompts=("prompt_2", "prompt_3"),
        default_steps=28,
        guidance_scale=7.0,
        single_file=SingleFile(
            ("sd3", "sd35_medium", "sd35_large"),
            {
                "text_encoder": "text_encoders.clip_l.",
                "text_encoder_2": "text_encoders.clip_g.",
                "text_encoder_3": "text_encoders.t5xxl.",
                "transformer": "model.diffusion_model.",
                "vae": "first_stage_model.",
            },
        ),
        tiny_vae="madebyollin/taesd3",
        # The T5 encoder is 9.5 GB in half precision, and the pipeline does without it.
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    ),
)

# What the authors' model cards (https://huggingface.co/<repo>) run them with.
_FAMILIES = (
    Family(
        "SDXL-Turbo",
        "StableDiffusionXLPipeline",
        ("stabilityai/sdxl-turbo",),
        default_steps=1,
        guidance_scale=0.0,
        steps=(1, 2, 3, 4),
        guidance_free=True,
    ),
    Family(
        "SD-Turbo",
        "StableDiffusionPipeline",
        ("stabilityai/sd-turbo",),
        default_steps=1,
        guidance_scale=0.0,
        steps=(1, 2, 3, 4),
        guidance_free=True,
    ),
    Family(
        "Stable Diffusion 3.5 Large",
        "StableDiffusion3Pipeline",
        ("stabilityai/stable-diffusion-3.5-large",),
        default_steps=28,
        guidance_scale=3.5,
    ),
    Family(
        "Stable Diffusion 3.5 Large Turbo",
        "StableDiffusion3Pipeline",
        ("stabilityai/stable-diffusion-3.5-large-turbo",),
        default_steps=4,
        guidance_scale=0.0,
        steps=(4,),
        guidance_free=True,
    ),
    Family(
        "Stable Diffusion 3.5 Medium",
        "StableDiffusion3Pipeline",
        ("stabilityai/stable-diffusion-3.5-medium",),
        default_steps=40,
        guidance_scale=4.5,
    ),
)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    found.pipeline: found for found in _ARCHITECTURES
}
_BY_REPO = {repo.casefold(): family for family in _FAMILIES for repo in family.repos}


def family_of(repo: str) -> Family | None:
    """The family a Hub repo belongs to, if it has one; the Hub's names do not depend on case."""
    return _BY_REPO.get(repo.casefold())
