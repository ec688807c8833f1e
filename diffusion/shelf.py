"""Several models of one architecture that take turns in the same modules.

All of them wait in host memory, pinned where there is a card; the one whose turn it is gets copied over the one before,
so that switching costs a copy, and compiled code and CUDA graphs stay valid. What two of them have in common, a VAE or
text encoders, is held once and not copied.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffusion.build import module_dtype
from diffusion.errors import ModelError
from diffusion.host_memory import rooms_like
from diffusion.landing import slots
from diffusion.model import Model
from diffusion.refresh import Staged, same_config

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OnShelf:
    """A model as it waits in host memory."""

    model: Model
    tensors: Tensors


class Shelf:
    """Begins with the model that lies on the device. One thread at a time may use it, but for `hold`.

    `loaded` names the model on the device, and is empty where a switch has failed; `seconds` is what the last switch
    took, and `since` when it was (`time.perf_counter`).

    Args:
        changed: called when the device's weights are other ones, on the thread that made them so.
    """

    def __init__(self, first: Model, changed: Callable[[], None]) -> None:
        self.loaded = first.name
        self.seconds = 0.0
        self.since = time.perf_counter()
        self._changed = changed
        self._device, self._dtype = first.device, first.dtype
        self._name = first.name
        self._modules = {
            part: getattr(first.pipeline, part) for part in first.recipe.architecture.modules
        }
        # Where everything lies on the device; never another place. And what was copied there.
        self._places = dict(_named_tensors(first))
        self._there: Tensors = {}
        self._waiting: dict[str, Tensors] = {}

    @property
    def shared(self) -> bool:
        """Whether there is more than one model."""
        return len(self._waiting) > 1

    def hold(self, name: str, staged: Staged) -> OnShelf:
        """Bring a model into the host memory that it will wait in, for `put`. The one on the device goes on meanwhile.

        Raises `ModelError` when its parts are not built like the first model's, whose modules it is to use.
        """
        self._check(name, staged)
        if not self._waiting:
            # Alone, the first one needed no copy.
            self._there = self._held(self._places)
            self._waiting[self.loaded] = self._there.copy()
        model = Model(staged.pipeline, staged.recipe, staged.version, name)
        tensors = self._held(dict(_named_tensors(model)))
        for part, module in self._modules.items():
            setattr(model.pipeline, part, module)
        if (tiny := model.pipeline.preview_vae) is not None:
            tiny.to(self._device, self._dtype)  # so small that each keeps its own there
        return OnShelf(model, tensors)

    def put(self, held: OnShelf) -> None:
        """Let it take its turns; in the place of another version, also on the device, where there is one."""
        name = held.model.name
        before = self._waiting.get(name)
        self._waiting[name] = held.tensors
        if name != self.loaded or before is None:
            return
        try:
            self._copy(name)
        except BaseException:
            # The version before goes on, and is copied back when its turn comes.
            self._waiting[name] = before
            raise

    def bring(self, name: str) -> None:
        """Have the model `name` on the device; `seconds` is then what that took, if it was not there."""
        if name == self.loaded:
            return
        begun = time.perf_counter()
        self._copy(name)
        self.since = time.perf_counter()
        self.seconds = self.since - begun

    def _copy(self, name: str) -> None:
        # Until all of it is there it is nobody's: what fails halfway must not pass for the one before.
        self.loaded = ""
        with torch.no_grad():
            for key, tensor in self._waiting[name].items():
                if self._there.get(key) is not tensor:
                    self._there.pop(key, None)
                    self._places[key].copy_(tensor, non_blocking=True)
                    self._there[key] = tensor
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._changed()
        self.loaded = name

    def _check(self, name: str, staged: Staged) -> None:
        for part, ours in self._modules.items():
            theirs = getattr(staged.pipeline, part, None)
            if (ours is None) != (theirs is None) or (
                theirs is not None and not same_config(ours, theirs)
            ):
                raise ModelError(
                    f"{name} cannot share a card with {self._name}: its {part} is built differently. Name models "
                    "of one architecture in MODEL_PATH, or serve this one from a server of its own."
                )
        half = self._modules["vae"].dtype == torch.float16
        if (
            half
            and module_dtype(staged.pipeline.vae, staged.recipe, torch.float16) == torch.float32
        ):
            raise ModelError(
                f"{name} cannot share a card with {self._name} in float16: its VAE overflows there and has to be "
                "float32. Serve both in bfloat16 (DTYPE), or publish it with a VAE that does not."
            )

    def _held(self, tensors: Tensors) -> Tensors:
        """The tensors as they wait on the host; what another model has too is not held twice.

        They lie as their places on the device do, so that a copy needs no memory there.
        """
        held: Tensors = {}
        own: list[str] = []
        for key, tensor in tensors.items():
            waiting = tensor.detach().to("cpu", self._places[key].dtype)
            shared = (
                other[key] for other in self._waiting.values() if torch.equal(other[key], waiting)
            )
            found = next(shared, None)
            if found is None:
                own.append(key)
            else:
                held[key] = found
        pinned = self._device.type == "cuda"
        rooms = rooms_like([self._places[key] for key in own], pinned=pinned)
        for key, room in zip(own, rooms, strict=True):
            held[key] = room.copy_(tensors[key].detach())
        return held


def _named_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    for part in model.recipe.architecture.modules:
        module: Any = getattr(model.pipeline, part)
        if module is not None:
            for name, slot in slots(module, None):
                yield f"{part}: {name}", slot.tensor
