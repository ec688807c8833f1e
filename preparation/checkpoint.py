"""A single-file checkpoint: one safetensors file that holds all of a model under its authors' own names.

Knows what such a file holds, by its header alone. Where the rest of a pipeline comes from (configs, tokenizers) is
`single_file`'s, taking the file apart `unpack`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError

from diffusion.families import ARCHITECTURES, Architecture
from preparation.convert import TensorInfo, read_headers, unpacked_dtype
from preparation.errors import UsageError
from preparation.hub import HubRepo
from preparation.origin import Origin
from weights.safetensors_layout import DTYPE_BYTES

_SHOWN = 3  # names of tensors in a message
# Beside weights in 8 bits these hold what to multiply them with, which stock diffusers does not either: the names that
# ComfyUI gave them first, and those it gives them now.
_SCALES = ("scale_weight", "scaled_fp8", "weight_scale", "comfy_quant")


@dataclass(frozen=True)
class Checkpoint:
    """The file at its origin, and what its header says of each tensor."""

    origin: Origin
    path: str
    tensors: Mapping[str, TensorInfo]

    @property
    def label(self) -> str:
        return f"{self.origin.label}: {self.path}"

    def held(self, architecture: Architecture) -> dict[str, int]:
        """Bytes of every module of `architecture` that is in the file, by its name, as `unpack` writes it."""
        held = {}
        for module, prefix in architecture.single_file.prefixes.items():
            own = [one for name, one in self.tensors.items() if name.startswith(prefix)]
            if own:
                wide = unpacked_dtype(own)
                held[module] = sum(one.count * DTYPE_BYTES[wide] for one in own)
        return held

    @cached_property
    def kind(self) -> str | None:
        """What diffusers takes it for; None where nothing in it tells.

        Imports diffusers, which takes seconds.
        """
        import torch
        from diffusers.loaders.single_file_utils import (
            CHECKPOINT_KEY_NAMES,
            infer_diffusers_model_type,
        )

        shapes = {
            name: torch.empty(tensor.shape, device="meta") for name, tensor in self.tensors.items()
        }
        try:
            kind: str = infer_diffusers_model_type(shapes)
        except (KeyError, IndexError, ValueError, RuntimeError, NotImplementedError):
            return None
        # It is also the answer for whatever was not recognised.
        return None if kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in shapes else kind

    def check_usable(self) -> None:
        """Raises UsageError for what is plainly something else than a whole checkpoint, and says what."""
        names = sorted(self.tensors)
        if any("lora" in name.lower() for name in names):
            raise UsageError(
                f"{self.label} is a LoRA, which changes a model and is none. Give the model it is for, and "
                "the file with --lora."
            )
        if scale := next((name for name in names if name.endswith(_SCALES)), None):
            raise UsageError(
                f"{self.label} holds 8-bit weights with scales of their own ({scale}), which diffusers cannot read. "
                "Look for the same checkpoint in half precision."
            )
        # Cast as they are, they would be taken for the weights themselves.
        if integer := next((name for name in names if self._is_integer_weight(name)), None):
            raise UsageError(
                f"{self.label} holds weights as integers ({integer} is {self.tensors[integer].dtype}), which diffusers "
                "cannot read. Look for the same checkpoint in half precision."
            )
        if not any(self.held(architecture) for architecture in ARCHITECTURES.values()):
            raise UsageError(
                f"{self.label} is no single-file checkpoint of a family that can be served: it holds "
                f"{_listed(names)}. Of a component alone, give the repo or folder of its whole pipeline."
            )

    def _is_integer_weight(self, name: str) -> bool:
        return name.endswith(".weight") and not self.tensors[name].dtype.startswith(("F", "BF"))


def open_checkpoint(origin: Origin, path: str) -> Checkpoint:
    """Read the file's header: of one on the Hub that is not on this disk yet, nothing else moves.

    Raises:
        UsageError: there is no such file, or it is plainly no checkpoint.
        PreparationError: the Hub cannot be reached, the file is damaged.
    """
    if path not in origin.files:
        others = sorted(one for one in origin.files if one.endswith(".safetensors"))
        raise UsageError(
            f"{origin.label} has no file {path}. Its safetensors files are {_listed(others)}."
        )
    if isinstance(origin, HubRepo) and origin.missing([path]):
        found = _read_remote_header(origin, path)
    else:
        (file,) = origin.fetch([path], jobs=1, on_bytes=lambda _size: None).values()
        found = read_headers([file], f"{origin.label}: {path}")
    checkpoint = Checkpoint(origin, path, {info.name: info for info in found})
    checkpoint.check_usable()
    return checkpoint


def _read_remote_header(repo: HubRepo, path: str) -> list[TensorInfo]:
    api = HfApi(endpoint=repo.hub.endpoint, token=repo.hub.token)
    with repo.hub.explained(f"reading the header of {path} of", repo.repo_id, repo.commit):
        try:
            found = api.parse_safetensors_file_metadata(repo.repo_id, path, revision=repo.commit)
        except SafetensorsParsingError as error:
            raise UsageError(
                f"{repo.repo_id}: {path} is no intact safetensors file ({error})."
            ) from error
    for name, tensor in found.tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise UsageError(
                f"{repo.repo_id}: {path}: tensor {name} has the unsupported dtype {tensor.dtype}."
            )
    return [
        TensorInfo(Path(path), name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in found.tensors.items()
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
