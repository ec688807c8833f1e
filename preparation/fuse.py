"""LoRAs into a component's weights, once and for all, by diffusers' and PEFT's own code: the result is stock's.

One component at a time is in memory, in the dtype its files hold, with the LoRAs that change it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.families import Architecture
from preparation.convert import TensorInfo, reading
from preparation.errors import UsageError
from preparation.filled import fill

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on this disk. `label` is what to call it in a message."""

    file: Path
    weight: float
    label: str


@dataclass(frozen=True)
class _Loaded:
    """A LoRA in the names of diffusers, its keys by component."""

    weights: Mapping[str, Any]
    alphas: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    label: str
    weight: float

    def acts_on(self, component: str) -> bool:
        return any(key.startswith(f"{component}.") for key in self.weights)


class Loras:
    """LoRAs read from their files, ready to be merged into the components of one pipeline class.

    Raises UsageError for a file that is none, or is one for another kind of model.
    """

    def __init__(
        self,
        files: Sequence[LoraFile],
        architecture: Architecture,
        configs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        import diffusers

        self._pipeline = getattr(diffusers, architecture.pipeline)
        self._architecture = architecture
        self._loaded = [self._load(file, configs) for file in files]

    def components(self) -> frozenset[str]:
        """The components that any of them changes."""
        return frozenset(
            name
            for name in self._architecture.modules
            if any(lora.acts_on(name) for lora in self._loaded)
        )

    def fused(
        self, component: str, tensors: Sequence[TensorInfo], config: Mapping[str, Any], label: str
    ) -> dict[str, Any]:
        """The component's weights under the names its files use, all LoRAs merged in, in the order given.

        Raises UsageError where one does not fit.
        """
        from diffusion.components import build_module

        configs = {f"{component}/config.json": json.dumps(config).encode()}
        module = build_module(component, self._architecture.modules[component], configs)
        slots = fill(module, tensors, label)
        acting = [lora for lora in self._loaded if lora.acts_on(component)]
        names = [f"lora-{number}" for number in range(len(acting))]
        for name, lora in zip(names, acting, strict=True):
            with _explained(lora.label, label):
                self._add(component, module, name, lora)
        with _explained(acting[-1].label, label):
            self._merge(component, module, names, [lora.weight for lora in acting])
        return {name: slot.tensor.detach().contiguous() for name, slot in slots.items()}

    def _load(self, file: LoraFile, configs: Mapping[str, Mapping[str, Any]]) -> _Loaded:
        from safetensors.torch import load_file

        with reading(file.file, file.label):
            weights = load_file(file.file)
        if not any("lora" in key for key in weights):
            raise UsageError(
                f"{file.label} is no LoRA: none of its {len(weights)} tensors has 'lora' in its name."
            )
        options = {"unet_config": _Config(configs["unet"])} if "unet" in configs else {}
        try:
            found = self._pipeline.lora_state_dict(weights, return_lora_metadata=True, **options)
        except Exception as error:  # whatever a converter makes of names it does not know
            raise UsageError(
                f"{file.label} cannot be read as a LoRA for a {self._architecture.pipeline} "
                f"({type(error).__name__}: {error}). Is it one for another kind of model?"
            ) from error
        # Where files carry no alphas, some of diffusers' classes leave them out of the answer.
        converted, *more = found
        alphas = more[0] if len(more) == 2 else None
        metadata = _metadata_of(file.file)
        stray = sorted(
            key for key in converted if key.split(".")[0] not in self._architecture.modules
        )
        if stray:
            raise UsageError(
                f"{file.label} changes {stray[0]}, which is no part of a {self._architecture.pipeline}. "
                "Is it a LoRA for another kind of model?"
            )
        return _Loaded(converted, alphas, metadata, file.label, file.weight)

    def _add(self, component: str, module: Any, name: str, lora: _Loaded) -> None:
        own = {key: value for key, value in lora.weights.items() if key.startswith(f"{component}.")}
        common = {"adapter_name": name, "network_alphas": lora.alphas, "metadata": lora.metadata}
        if component == self._architecture.denoiser:
            module.load_lora_adapter(own, prefix=component, **common)
        else:
            self._pipeline.load_lora_into_text_encoder(
                own, text_encoder=module, prefix=component, **common
            )

    def _merge(
        self, component: str, module: Any, names: Sequence[str], weights: Sequence[float]
    ) -> None:
        from diffusers.loaders.lora_base import (
            fuse_text_encoder_lora,
            set_adapters_for_text_encoder,
        )

        if component == self._architecture.denoiser:
            module.set_adapters(list(names), list(weights))
            module.fuse_lora(adapter_names=list(names))
        else:
            set_adapters_for_text_encoder(list(names), module, list(weights))
            fuse_text_encoder_lora(module, adapter_names=list(names))


class _Config(dict[str, Any]):
    """A config as diffusers hands it around: entries that are attributes too."""

    __getattr__ = dict.__getitem__


def _metadata_of(file: Path) -> Mapping[str, Any] | None:
    from diffusers.loaders.lora_base import _load_sft_state_dict_metadata

    found: Mapping[str, Any] | None = _load_sft_state_dict_metadata(str(file))
    return found


@contextmanager
def _explained(lora: str, label: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{lora} does not fit {label} ({type(error).__name__}: {reason}). Is it a LoRA for another kind of model?"
        ) from error
