"""Puts streamed tensors into modules that have none yet, one by one as they arrive, and says what did not fit."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel

from diffusion.dtypes import DTYPES
from diffusion.errors import ModelError

# torch's own allocator aligns to this. Vector kernels may sum in another order from an odd address, and the same seed
# has to give the same image whatever address the reader's buffer had.
_ALIGNMENT = 64

_NAMED = 3  # examples of each problem in a message
_PUBLISH_AGAIN = "Publish the model again from a complete diffusers folder"


class LandedTensor(Protocol):
    """One tensor as the weights room hands it over; `data` belongs to whoever takes it.

    It is a buffer in the host's memory, or a tensor where its bytes went to the device as they came.
    """

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def data(self) -> Any: ...


@dataclass
class Slot:
    """A place in a module for one tensor."""

    owner: nn.Module
    attribute: str
    shape: torch.Size
    dtype: torch.dtype | None  # of a floating tensor; None: whatever it came in
    filled_from: str | None = None

    @property
    def tensor(self) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self.owner, self.attribute)
        return tensor

    @property
    def final_dtype(self) -> torch.dtype:
        """What the tensor that is here now is to become."""
        floating = self.tensor.is_floating_point()
        return self.dtype if floating and self.dtype is not None else self.tensor.dtype

    def fill(self, tensor: torch.Tensor) -> None:
        if isinstance(getattr(self.owner, self.attribute), nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self.owner, self.attribute, tensor)


@dataclass
class Problems:
    """Everything that did not fit, so that one message tells all of it."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def raise_if_any(self, advice: str = _PUBLISH_AGAIN) -> None:
        found = [
            f"{len(examples)} {what} ({'; '.join(examples[:_NAMED])}{'; …' * (len(examples) > _NAMED)})"
            for what, examples in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of the wrong shape or type", self.misshapen),
                ("found twice", self.repeated),
            )
            if examples
        ]
        if found:
            if self.repeated:
                advice = "Keep one variant of each weight file in the folder"
            raise ModelError(
                f"The model's tensors do not fit its configs: {', '.join(found)}. {advice}."
            )


class Landing:
    """One module waiting for its tensors; `device` and `dtype` are what they become.

    Integers keep their type, and with None all do.
    """

    def __init__(
        self,
        folder: str,
        module: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self._folder = folder
        self._device = device
        self._module = module
        self._slots = dict(slots(module, dtype))
        # Older files carry CLIP's position ids, which newer modules compute: expected, and not needed.
        self._computed = {name for name, _ in module.named_buffers()} - self._slots.keys()
        self._aliases = _aliases(module, self._slots.keys() | self._computed)
        # One tensor under two names (T5's embedding): files hold it under either, or both.
        self._tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}

    def slot(self, name: str) -> Slot | None:
        """Where the tensor lies that files call `name`; None for one that the module computes by itself."""
        return self._slots.get(self._aliases.get(name, name))

    def take(self, landed: LandedTensor, problems: Problems) -> None:
        """Make `landed` a parameter of the module, or note why not. Keeps no other reference to its memory."""
        place = f"{landed.path}: {landed.name}"
        name = self._aliases.get(landed.name, landed.name)
        if name not in self._slots:
            if name not in self._computed:
                problems.unexpected.append(place)
            return
        slot = self._slots[name]
        if slot.filled_from is not None:
            problems.repeated.append(f"{place}, after {slot.filled_from}")
        elif tuple(landed.shape) != tuple(slot.shape):
            problems.misshapen.append(
                f"{place} is {list(landed.shape)}, its config wants {list(slot.shape)}"
            )
        elif landed.dtype not in DTYPES:
            problems.misshapen.append(f"{place} is {landed.dtype}, which is not supported")
        else:
            dtype = slot.dtype or DTYPES[landed.dtype]
            slot.fill(_on_device(landed, place, self._device, dtype))
            slot.filled_from = landed.path

    def finish(self, problems: Problems) -> None:
        """Note what never came, and bring the computed buffers to the device."""
        for name, other in self._tied.items():
            self._tie(self._slots[name], self._slots[other])
        for name, slot in self._slots.items():
            if slot.filled_from is None:
                problems.missing.append(f"{self._folder}/: {name}")
        move_buffers(self._module, self._device)

    @staticmethod
    def _tie(one: Slot, other: Slot) -> None:
        filled, empty = (other, one) if other.filled_from is not None else (one, other)
        if filled.filled_from is not None:
            setattr(empty.owner, empty.attribute, filled.tensor)
            empty.filled_from = filled.filled_from


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Bring the buffers that a module's constructor computed to the device; no file holds them."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(part, name, buffer.to(device))


def slots(module: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Slot]]:
    """Every place for a tensor in a module, by the name its class gives it, for a pipeline of `dtype`."""
    kept = _kept_in_float32(module, dtype)
    for name, tensor in module.state_dict().items():
        parent, _, attribute = name.rpartition(".")
        slot_dtype = torch.float32 if kept & set(name.split(".")) else dtype
        yield name, Slot(module.get_submodule(parent), attribute, tensor.shape, slot_dtype)


def _kept_in_float32(module: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """What a class keeps in float32 though it is loaded as `dtype`, by the name of any part of a tensor's path."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    always = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype not in (torch.float16, torch.bfloat16):
        return set()
    if isinstance(module, PreTrainedModel) and dtype != torch.float16:
        return always  # the other list is transformers' for float16 alone, and diffusers' for any
    return kept | always


def _aliases(module: nn.Module, names: Set[str]) -> dict[str, str]:
    """Names that files use for what the installed classes call otherwise, as the libraries' own loaders map them."""
    aliases: dict[str, str] = {}
    if isinstance(module, CLIPTextModel):
        # transformers 5 dropped this level from the class; published files all have it.
        aliases |= {f"text_model.{name}": name for name in names}
    for path, block in module.named_modules():
        # VAEs saved before diffusers 0.15 or so, when its attention block was another class.
        if getattr(block, "_from_deprecated_attn_block", False):
            for old, new in (
                ("query", "to_q"),
                ("key", "to_k"),
                ("value", "to_v"),
                ("proj_attn", "to_out.0"),
            ):
                aliases |= {
                    f"{path}.{old}.{end}": f"{path}.{new}.{end}" for end in ("weight", "bias")
                }
    return aliases


def _on_device(
    landed: LandedTensor, place: str, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor on its device, in `dtype` if it is a floating one.

    On the CPU in the file's own dtype it stays in the reader's memory, so that loading needs no second copy.
    """
    if isinstance(
        landed.data, torch.Tensor
    ):  # on the card already (see arrival), which casts it before it leaves
        tensor = landed.data.to(dtype) if landed.data.is_floating_point() else landed.data
        return tensor.to(device)
    try:
        tensor = torch.frombuffer(landed.data, dtype=DTYPES[landed.dtype]).view(landed.shape)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"The bytes of {place} are not {list(landed.shape)} numbers of {landed.dtype} ({error}). "
            "Publish the model again."
        ) from error
    # In two steps: asked for both at once, torch casts before it copies, on one CPU core. From float16 to bfloat16 that
    # was 0.45 GB/s, 15 s for SDXL's 6.94 GB; the card does it in passing, for one more tensor of its memory.
    tensor = tensor.to(device)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if tensor.data_ptr() % _ALIGNMENT:
        return tensor.clone()
    return tensor
