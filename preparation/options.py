"""What a person wants made of a model before it is published: other precision, another VAE, LoRAs, few steps.

Each is a change of the plan, so nothing is decided later than before the first byte of weights moves.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from diffusion.families import PREVIEW_VAE, PREVIEW_VAE_CLASS
from diffusion.recipe import SDXL, Dtype, Source, lightning_recipe
from preparation.convert import TORCH_NAMES
from preparation.errors import UsageError
from preparation.folder import LocalFolder
from preparation.hub import Hub, HubRepo, is_repo_id
from preparation.lightning import LIGHTNING_REPO, lora_file
from preparation.lora import LoraName, find_lora, on_this_disk
from preparation.origin import Origin
from preparation.overflow import check_class
from preparation.plan import SCHEDULER_PATH, Component, Copy, Plan, component_of, published_texts
from preparation.select import select_weights

LightningSteps = Literal[1, 2, 4, 8]
DTYPES: Final = get_args(Dtype)
KNOWN_PREVIEW_VAE: Final = "auto"  # the tiny VAE that the model's family is known by
SMALLEST_SHARD = 1_000_000  # bytes
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


@dataclass(frozen=True)
class Options:
    """The default is: as the source has it, in shards that caches in front of S3 keep (`max_shard_size`, in bytes)."""

    loras: tuple[LoraName, ...] = ()
    lightning_steps: LightningSteps | None = None
    vae: str | None = None
    preview_vae: str | None = None
    dtype: Dtype | None = None
    max_shard_size: int | None = None

    def recorded(self) -> dict[str, Any]:
        """What was asked for beyond the default, as it may be published."""
        asked = {
            "lora": [name.recorded for name in self.loras],
            "lightning_steps": self.lightning_steps,
            "vae": self.vae and public_name(self.vae),
            "preview_vae": self.preview_vae and public_name(self.preview_vae),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
        }
        return {name: value for name, value in asked.items() if value}


def parse_size(text: str) -> int:
    """Bytes of "960MB", "1GB" or "500000000" (decimal units). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size; give for example 960MB or 2GB")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < SMALLEST_SHARD:
        raise ValueError(f"{text!r} is less than 1 MB, which would make a great many files")
    return size


def altered(plan: Plan, options: Options, hub: Hub) -> Plan:
    """The plan with everything done that was asked for.

    Raises UsageError where that is not possible; what is named is looked up, and nothing large is downloaded.
    """
    if options.max_shard_size is not None:
        plan = replace(plan, shard_limit=options.max_shard_size)
    if options.lightning_steps is not None:
        plan = _few_steps(plan, options.lightning_steps, hub)
    for name in options.loras:
        plan = _with_lora(plan, name, hub)
    if options.vae is not None:
        plan = _with_vae(plan, options.vae, hub)
    if options.preview_vae is not None:
        plan = _with_preview_vae(plan, options.preview_vae, hub)
    if options.dtype is not None:
        plan = _cast(plan, options.dtype)
    return plan


def _few_steps(plan: Plan, steps: LightningSteps, hub: Hub) -> Plan:
    """SDXL-Lightning's LoRA, and its recipe."""
    if plan.recipe.pipeline != SDXL.pipeline:
        raise UsageError(
            f"--lightning-steps makes few-step models of SDXL and its finetunes; {plan.source} is a "
            f"{plan.recipe.pipeline}."
        )
    if plan.recipe.guidance_free:
        raise UsageError(
            f"--lightning-steps: {plan.source} was already distilled, for {plan.recipe.default_steps} steps. "
            "Start from the model it was made of."
        )
    if steps == 1:
        raise UsageError(
            f"--lightning-steps 1 has no LoRA, only a whole UNet: publish {LIGHTNING_REPO} itself with it, or choose "
            "2, 4 or 8."
        )
    plan = _with_lora(plan, LoraName(LIGHTNING_REPO, lora_file(steps)), hub)
    recipe = lightning_recipe(steps, dtype=plan.recipe.dtype, source=plan.recipe.source)
    recipe = recipe.model_copy(update={"native_size": plan.recipe.native_size})
    texts = published_texts(
        json.loads(plan.texts["model_index.json"]), plan.texts[SCHEDULER_PATH], recipe
    )
    return replace(plan, recipe=recipe, texts={**plan.texts, **texts})


def _with_lora(plan: Plan, name: LoraName, hub: Hub) -> Plan:
    lora = find_lora(name, hub)
    return _with_parts(replace(plan, loras=(*plan.loras, lora)), lora.part)


def _with_vae(plan: Plan, place: str, hub: Hub) -> Plan:
    """Another VAE: a repo or folder that holds it at its root or, as a whole pipeline does, under vae/."""
    origin = open_place(place, hub)
    folder = "vae" if "vae/config.json" in origin.files else "."
    config = "vae/config.json" if folder == "vae" else "config.json"
    if config not in origin.files:
        raise UsageError(f"--vae {place} has no config.json, neither at its root nor under vae/.")
    chosen = select_weights(origin.files, "vae", origin.label, folder=folder)
    vae = Component("vae", chosen.stem, origin, chosen.files, architecture="AutoencoderKL")
    _check_vae(plan, origin.read(config), place)
    others = tuple(copy for copy in plan.copies if not copy.target.startswith("vae/"))
    plan = replace(
        plan,
        recipe=plan.recipe.model_copy(update={"vae_overflows": False}),
        copies=(*others, Copy("vae/config.json", origin, config)),
        components=tuple(vae if found.name == "vae" else found for found in plan.components),
    )
    return _with_parts(plan, _part(place, origin))


def _with_preview_vae(plan: Plan, place: str, hub: Hub) -> Plan:
    """A tiny VAE beside the pipeline: of a repo or folder that holds it at its root, or a model that has one."""
    if place == KNOWN_PREVIEW_VAE:
        place = plan.recipe.architecture.tiny_vae
    origin = open_place(place, hub)
    folder = PREVIEW_VAE if f"{PREVIEW_VAE}/config.json" in origin.files else "."
    config = "config.json" if folder == "." else f"{folder}/config.json"
    if config not in origin.files:
        raise UsageError(
            f"--preview-vae {place} has no config.json, neither at its root nor under {PREVIEW_VAE}/."
        )
    chosen = select_weights(origin.files, PREVIEW_VAE, origin.label, folder=folder)
    _check_preview_vae(plan, origin.read(config), place)
    others = tuple(found for found in plan.components if found.name != PREVIEW_VAE)
    target = f"{PREVIEW_VAE}/config.json"
    copies = tuple(copy for copy in plan.copies if copy.target != target)
    plan = replace(
        plan,
        copies=(*copies, Copy(target, origin, config)),
        components=(*others, component_of(chosen, origin)),
    )
    return _with_parts(plan, _part(place, origin))


def _check_preview_vae(plan: Plan, config: bytes, place: str) -> None:
    """It has to decode the latents that the model's own VAE decodes."""
    before = next(copy for copy in plan.copies if copy.target == "vae/config.json")
    try:
        own, tiny = json.loads(before.origin.read(before.path)), json.loads(config)
        found = tiny.get("_class_name")
        wanted = (own.get("latent_channels", 4), len(own["block_out_channels"]))
        kind = (
            tiny.get("latent_channels", 4),
            len(tiny.get("decoder_block_out_channels", [0] * 4)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--preview-vae {place}: a VAE's config.json cannot be read ({error})."
        ) from error
    known = f"for a {plan.recipe.pipeline} {plan.recipe.architecture.tiny_vae} will do"
    if found != PREVIEW_VAE_CLASS[1]:
        raise UsageError(
            f"--preview-vae {place} is an {found}, as its config.json says; previews are made with "
            f"{PREVIEW_VAE_CLASS[1]} alone: {known}."
        )
    if kind != wanted:
        raise UsageError(
            f"--preview-vae {place} decodes latents of {kind[0]} channels with {kind[1]} levels, where {plan.source} "
            f"has {wanted[0]} and {wanted[1]}: {known}."
        )


def _part(place: str, origin: Origin) -> str:
    return f"{place}@{origin.commit}" if isinstance(origin, HubRepo) else public_name(place)


def _check_vae(plan: Plan, config: bytes, place: str) -> None:
    """The denoiser's latents are of one kind of VAE: of so many channels, so much smaller than the image."""
    before = next(copy for copy in plan.copies if copy.target == "vae/config.json")
    try:
        own, other = json.loads(before.origin.read(before.path)), json.loads(config)
        check_class(other, f"--vae {place}")
        kinds = [
            (one.get("latent_channels", 4), len(one["block_out_channels"])) for one in (own, other)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--vae {place}: a VAE's config.json cannot be read ({error}).") from error
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"--vae {place} makes latents of {kinds[1][0]} channels with {kinds[1][1]} levels, where {plan.source} has "
            f"{kinds[0][0]} and {kinds[0][1]}. It is a VAE for another kind of model."
        )


def _cast(plan: Plan, dtype: Dtype) -> Plan:
    name = next(short for short, full in TORCH_NAMES.items() if full == dtype)
    components = tuple(replace(component, dtype=name) for component in plan.components)
    return replace(
        plan, components=components, recipe=plan.recipe.model_copy(update={"dtype": dtype})
    )


def open_place(place: str, hub: Hub) -> Origin:
    """A Hub repo, or the folder on this disk that is there or can be nothing else. Raises UsageError."""
    if "://" in place:
        raise UsageError(
            f"{place} cannot be read from here: give a Hub repo (OWNER/NAME) or a folder on this disk."
        )
    if _is_folder(place):
        return LocalFolder.open(on_this_disk(place))
    return hub.open(place)


def _is_folder(place: str) -> bool:
    return not is_repo_id(place) or on_this_disk(place).is_dir()


def public_name(place: str) -> str:
    """A repo as it is; of a folder on this disk its name alone."""
    return on_this_disk(place).resolve().name if _is_folder(place) else place


def _with_parts(plan: Plan, part: str) -> Plan:
    """Note in the recipe's source what else the model is made of."""
    source = plan.recipe.source or Source()
    before = source.parts
    if before is None:
        before = (f"{source.repo}@{source.revision}",) if source.repo else ()
    source = source.model_copy(update={"parts": (*before, part)})
    return replace(plan, recipe=plan.recipe.model_copy(update={"source": source}))
