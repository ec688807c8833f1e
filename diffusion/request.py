"""What a caller may ask of a checkpoint, and what it will then be given. Decides only; imports no torch."""

import logging
import math
import secrets
from dataclasses import dataclass

from diffusion.errors import RequestError
from diffusion.recipe import MAX_STEPS, Recipe
from diffusion.weighting import read_weights

logger = logging.getLogger(__name__)

SEEDS = 2**63

# Some 2,500 characters are read at most. This leaves room for any prompt a person writes, and keeps a 10 MB one away
# from the tokenizers, which would read all of it before dropping it.
MAX_PROMPT_CHARACTERS = 10_000


@dataclass(frozen=True)
class GenerationRequest:
    """One caller's wish. None means: whatever the checkpoint does best (and for the seed, a random one).

    `model` is one of the engine's, by name; None is its first. Sizes are in pixels. Image k of `num_outputs` uses
    seed + k, and is exactly the image that seed gives alone. Seeds have 63 bits, of which torch's CPU generator reads
    the low 32; they are handed to it as they are, so that stock diffusers makes the same image of the same seed.
    With `prompt_weighting`, parentheses, + and - in both prompts say how much words count (`weighting.py`); without,
    they are characters like any other.
    """

    prompt: str
    width: int
    height: int
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_outputs: int = 1
    model: str | None = None
    prompt_weighting: bool = False


@dataclass(frozen=True)
class Plan:
    """A request that the checkpoint can fulfil, with nothing left open."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    prompt_weighting: bool = False


def plan(
    request: GenerationRequest,
    recipe: Recipe,
    *,
    size_multiple: int,
    largest_size: int | None = None,
) -> Plan:
    """Check a request against what the checkpoint can do, and fill in what it leaves open.

    Sides are multiples of `size_multiple`, at most twice the native size, or `largest_size` where that is less.
    Raises `RequestError` naming the field, what it holds and what it may hold.
    """
    _check_prompt("prompt", request.prompt)
    if not request.prompt.strip():
        raise RequestError("prompt is empty; say what the image should show.")
    _check_prompt("negative_prompt", request.negative_prompt)
    largest = min(2 * recipe.native_size, largest_size or 2 * recipe.native_size)
    for name, pixels in (("width", request.width), ("height", request.height)):
        _check_side(name, pixels, largest, size_multiple)
    if request.num_outputs < 1:
        raise RequestError(f"num_outputs is {request.num_outputs}; ask for at least 1 image.")
    negative_prompt = _negative_prompt(request, recipe)
    if request.prompt_weighting:
        _check_weights(request.prompt, negative_prompt, recipe)
    return Plan(
        prompt=request.prompt,
        negative_prompt=negative_prompt,
        width=request.width,
        height=request.height,
        steps=_steps(request.steps, recipe),
        guidance_scale=_guidance_scale(request, recipe),
        seeds=_seeds(request.seed, request.num_outputs),
        prompt_weighting=request.prompt_weighting,
    )


def _check_prompt(name: str, text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"{name} has {len(text):,} characters; {MAX_PROMPT_CHARACTERS:,} are the most that is accepted, and "
            "only the first 600 tokens, about 400 words, are read."
        )
    if "\0" in text:
        # No image file's metadata can hold one, so the image could not be made again from what its file says.
        raise RequestError(f"{name} contains a NUL character; send text without it.")


def _check_weights(prompt: str, negative_prompt: str | None, recipe: Recipe) -> None:
    if recipe.architecture.attends_to is None:
        raise RequestError(
            f"prompt_weighting is true, and a {recipe.pipeline} knows no weights; send false, or leave it out."
        )
    read_weights("prompt", prompt)
    if negative_prompt is not None:
        read_weights("negative_prompt", negative_prompt)


def _check_side(name: str, pixels: int, largest: int, multiple: int) -> None:
    if not 0 < pixels <= largest:
        raise RequestError(f"{name} is {pixels} pixels; this model makes 1 to {largest}.")
    if pixels % multiple:
        nearest = max(1, round(pixels / multiple)) * multiple
        raise RequestError(
            f"{name} is {pixels} pixels; this model makes multiples of {multiple}, such as {nearest}."
        )


def _steps(asked: int | None, recipe: Recipe) -> int:
    if asked is None:
        return recipe.default_steps
    if recipe.steps is not None and asked not in recipe.steps:
        able = " or ".join(str(count) for count in sorted(recipe.steps))
        raise RequestError(
            f"num_inference_steps is {asked}; this checkpoint was distilled for {able} and can do no other."
        )
    if not 1 <= asked <= MAX_STEPS:
        raise RequestError(
            f"num_inference_steps is {asked}; this checkpoint does 1 to {MAX_STEPS}."
        )
    return asked


def _guidance_scale(request: GenerationRequest, recipe: Recipe) -> float:
    asked = request.guidance_scale
    if asked is not None and not (math.isfinite(asked) and asked >= 0):
        raise RequestError(f"guidance_scale is {asked}; it must be a number from 0 up.")
    if not recipe.guidance_free:
        return recipe.guidance_scale if asked is None else asked
    if asked is not None and asked != recipe.guidance_scale:
        logger.info(
            "Ignoring guidance_scale %g: this checkpoint was distilled without guidance and runs at %g.",
            asked,
            recipe.guidance_scale,
        )
    return recipe.guidance_scale


def _negative_prompt(request: GenerationRequest, recipe: Recipe) -> str | None:
    # SDXL was trained with zeros, not with the encoding of "", where there is nothing to avoid; None gives those.
    if not request.negative_prompt.strip():
        return None
    if recipe.guidance_free:
        logger.info(
            "Ignoring negative_prompt: this checkpoint was distilled without guidance, which it acts through."
        )
        return None
    return request.negative_prompt


def _seeds(first: int | None, count: int) -> tuple[int, ...]:
    if first is None:
        first = secrets.randbelow(SEEDS)
    if not 0 <= first < SEEDS:
        raise RequestError(f"seed is {first}; it must be from 0 to {SEEDS - 1}.")
    return tuple((first + k) % SEEDS for k in range(count))
