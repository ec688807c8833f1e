"""Several models of one architecture that take turns in the same modules.

All of them wait in host memory, pinned where there is a card; the one whose turn it is gets copied over the one before,
so that switching costs a copy, and compiled code and CUDA graphs stay valid. What two of them have in common, a VAE or
text encoders, is held once and not copied.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from diffusion.build import module_dtype
from diffusion.errors import ModelError
from diffusion.landing import slots
from diffusion.model import Model
from diffusion.refresh import Staged, same_config

Tensors = dict[str, torch.Tensor]


class Shelf:
    """Begins with the model that lies on the device. One thread at a time may use it.

    `loaded` names the model on the device; `seconds` is what the last switch took.
    """

    def __init__(self, first: Model) -> None:
        self.loaded = first.name
        self.seconds = 0.0
        self._device = first.device
        self._first = first
        # Where everything lies on the device; never another place. And what was copied there.
        self._places = dict(_named_tensors(first))
        self._there: Tensors = {}
        self._waiting: dict[str, Tensors] = {}

    @property
    def shared(self) -> bool:
        """Whether there is more than one model."""
        return len(self._waiting) > 1

    def add(self, name: str, staged: Staged) -> Model:
        """Put a model on the shelf, or another version in its place; if it is the one on the device, it goes there too.

        Raises `ModelError` when its parts are not built like the first model's, whose modules it is to use.
        """
        self._check(name, staged)
        if not self._waiting:
            # Alone, the first one needed no copy.
            self._there = {key: self._held(key, tensor) for key, tensor in self._places.items()}
            self._waiting[self.loaded] = self._there.copy()
        model = Model(staged.pipeline, staged.recipe, staged.version, name)
        self._waiting[name] = {
            key: self._held(key, tensor) for key, tensor in _named_tensors(model)
        }
        for part in self._first.recipe.architecture.modules:
            setattr(model.pipeline, part, getattr(self._first.pipeline, part))
        if (tiny := model.pipeline.preview_vae) is not None:
            tiny.to(self._device, self._first.dtype)  # so small that each keeps its own there
        if name == self.loaded:
            self._copy(name)
        return model

    def bring(self, name: str) -> None:
        """Have the model `name` on the device; `seconds` is then what that took, if it was not there."""
        if name == self.loaded:
            return
        begun = time.perf_counter()
        self._copy(name)
        self.loaded = name
        self.seconds = time.perf_counter() - begun

    def _copy(self, name: str) -> None:
        with torch.no_grad():
            for key, tensor in self._waiting[name].items():
                if self._there.pop(key, None) is not tensor:
                    self._places[key].copy_(tensor, non_blocking=True)
                self._there[key] = tensor
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _check(self, name: str, staged: Staged) -> None:
        for part in self._first.recipe.architecture.modules:
            ours, theirs = getattr(self._first.pipeline, part), getattr(staged.pipeline, part, None)
            if (ours is None) != (theirs is None) or (
                theirs is not None and not same_config(ours, theirs)
            ):
                raise ModelError(
                    f"{name} cannot share a card with {self._first.name}: its {part} is built differently. Name models "
                    "of one architecture in MODEL_PATH, or serve this one from a server of its own."
                )
        half = self._first.pipeline.vae.dtype == torch.float16
        if (
            half
            and module_dtype(staged.pipeline.vae, staged.recipe, torch.float16) == torch.float32
        ):
            raise ModelError(
                f"{name} cannot share a card with {self._first.name} in float16: its VAE overflows there and has to be "
                "float32. Serve both in bfloat16 (DTYPE), or publish it with a VAE that does not."
            )

    def _held(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it waits on the host; one that another model has too is not held twice."""
        place = self._places[key]
        waiting = tensor.detach().to("cpu", place.dtype)
        for other in self._waiting.values():
            if torch.equal(other[key], waiting):
                return other[key]
        if self._device.type == "cuda":
            return waiting.pin_memory()
        return waiting.clone() if waiting.data_ptr() == tensor.data_ptr() else waiting


def _named_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    for part in model.recipe.architecture.modules:
        module: Any = getattr(model.pipeline, part)
        if module is not None:
            for name, slot in slots(module, None):
                yield f"{part}: {name}", slot.tensor
