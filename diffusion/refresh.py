"""A new version of a model in the place of the old one: gathered and checked beside it, then copied over it.

When nobody uses the old one, and whose turn it is, is the engine's business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion.build import build_pipeline, module_dtype
from diffusion.device import ran_out_of_memory
from diffusion.errors import ModelError
from diffusion.families import PREVIEW_VAE
from diffusion.fitting import decode_in_tiles
from diffusion.landing import LandedTensor, Slot, move_buffers, slots
from diffusion.recipe import Recipe

# accelerate builds empty modules by patching torch.nn for the whole process: meanwhile, no other thread may build any,
# or give one its parameters.
one_refresh_at_a_time = Lock()

# What a config notes about how it was saved. None of it changes what the module computes.
_ABOUT_THE_FILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Staged:
    """A whole model in the host's memory, its tensors as its files hold them, ready to take over."""

    pipeline: DiffusionPipeline
    recipe: Recipe
    version: str | None


def stage(
    configs: Mapping[str, bytes],
    tensors: Iterable[LandedTensor],
    recipe: Recipe,
    version: str | None = None,
) -> Staged:
    """Gather a model on the host and check all of it, while another one serves. Takes its size in host memory.

    Arguments and errors are those of `build_pipeline`. One refresh at a time in a process: others wait.
    """
    with one_refresh_at_a_time:
        pipeline = build_pipeline(configs, tensors, recipe, device=torch.device("cpu"), dtype=None)
    return Staged(pipeline, recipe, version)


@dataclass(frozen=True)
class _Move:
    """One staged tensor, and the memory on the device that it goes to."""

    slot: Slot
    target: torch.Tensor


def take_over(
    staged: Staged, old: DiffusionPipeline, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Bring the staged pipeline to `device`, in `dtype`, into the memory of `old`, which is gone afterwards.

    A module of `old` whose config is still the same is kept, and its tensors overwritten where they are. Others get
    memory of their own before anything is overwritten: when the device has none left, `ModelError` is raised, and
    `old` is as it was. Staged tensors are let go one by one, as they are copied. Nobody may be using `old`.
    """
    reason = None
    try:
        moves, scratch = _prepare(staged.pipeline, old, staged.recipe, device, dtype)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Only here, with the exception gone, is what was allocated gone too.
    if reason is not None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise ModelError(
            f"The device {device} has no memory for the parts of version {staged.version} whose configs changed, "
            f"beside those they replace ({reason}). The old version goes on serving; to serve "
            "this one, start the server anew."
        )
    with torch.no_grad():
        for move in moves:
            _carry_out(move, scratch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepare(
    new: DiffusionPipeline,
    old: DiffusionPipeline,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[_Move], torch.Tensor]:
    """Everything that can fail. `new` gets those modules of `old` that it keeps, once nothing can fail any more."""
    moves: list[_Move] = []
    kept: dict[str, nn.Module] = {}
    built: list[tuple[nn.Module, torch.device]] = []
    for name in (*recipe.architecture.modules, PREVIEW_VAE):
        module, predecessor = getattr(new, name), getattr(old, name, None)
        if module is None:
            continue  # a part that this version does without
        waiting = dict(slots(module, module_dtype(module, recipe, dtype)))
        targets = predecessor.state_dict() if predecessor is not None else {}
        # Some parts may lie in host memory, where the card has no room for them.
        place = next(iter(targets.values())).device if targets else device
        if (
            predecessor is not None
            and same_config(module, predecessor)
            and _fit(waiting, targets, place)
        ):
            kept[name] = predecessor
        else:
            built.append((module, place))
            targets = {
                key: torch.empty(slot.shape, dtype=slot.final_dtype, device=place)
                for key, slot in waiting.items()
            }
        moves.extend(_Move(slot, targets[key]) for key, slot in waiting.items())
    scratch = torch.empty(_scratch_bytes(moves), dtype=torch.uint8, device=device)
    for module, place in built:
        move_buffers(module, place)
    if "vae" not in kept and old.vae.use_tiling:
        decode_in_tiles(new.vae)  # the card has no more room than it had
    for name, predecessor in kept.items():
        setattr(new, name, predecessor)
    return moves, scratch


def same_config(one: nn.Module, other: nn.Module) -> bool:
    def meaning(module: Any) -> dict[str, Any]:
        config = module.config
        # transformers has a class for it, diffusers a dictionary.
        entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return {
            key: value
            for key, value in entries.items()
            if not key.startswith("_") and key not in _ABOUT_THE_FILE
        }

    return type(one) is type(other) and meaning(one) == meaning(other)


def _fit(
    waiting: Mapping[str, Slot], targets: Mapping[str, torch.Tensor], device: torch.device
) -> bool:
    return waiting.keys() == targets.keys() and all(
        (slot.shape, slot.final_dtype, device)
        == (targets[key].shape, targets[key].dtype, targets[key].device)
        for key, slot in waiting.items()
    )


def _crosses_in_two_steps(source: torch.Tensor, target: torch.Tensor) -> bool:
    # From the host, torch casts before it copies, on one CPU core (0.45 GB/s, see landing); and it allocates on the
    # device for a target whose memory is not in order. In halfway memory of our own, nothing can fail.
    return source.device != target.device and (
        source.dtype != target.dtype or not target.is_contiguous()
    )


def _scratch_bytes(moves: Iterable[_Move]) -> int:
    sizes = (
        move.slot.tensor.nbytes
        for move in moves
        if _crosses_in_two_steps(move.slot.tensor, move.target)
    )
    return max(sizes, default=0)


def _carry_out(move: _Move, scratch: torch.Tensor) -> None:
    source = move.slot.tensor
    if _crosses_in_two_steps(source, move.target):
        halfway = scratch[: source.nbytes].view(source.dtype).view(source.shape)
        source = halfway.copy_(source)
    move.target.copy_(source)
    move.slot.fill(move.target)  # and with that the staged tensor is let go
