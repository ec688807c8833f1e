"""One component's weights in memory: from files on this disk into a module, as the server's come from a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preparation.convert import TensorInfo, reading
from preparation.errors import UsageError

if TYPE_CHECKING:
    import torch

    from diffusion.landing import Slot


def fill(
    module: Any, tensors: Sequence[TensorInfo], label: str, dtype: torch.dtype | None = None
) -> dict[str, Slot]:
    """Give `module`, built without weights, those of the files; returns where each is, by the name its file gives it.

    `dtype` is what floating-point ones become; with None they stay as they are. Each is let go when nobody holds it.

    Raises:
        UsageError: tensors are missing, unexpected or misshapen.
        PreparationError: a file is damaged.
    """
    import torch
    from safetensors import safe_open

    from diffusion.errors import ModelError
    from diffusion.landing import Landing, Problems

    landing = Landing(label, module, device=torch.device("cpu"), dtype=dtype)
    problems = Problems()
    files = dict.fromkeys(info.file for info in tensors)
    for file in files:
        with reading(file, label), safe_open(file, framework="pt") as opened:
            for info in tensors:
                if info.file == file:
                    # In memory of its own: a view of the mapped file keeps all that was written to the others.
                    tensor = opened.get_tensor(info.name).clone()
                    landing.take(_Landed(info, tensor), problems)
    landing.finish(problems)
    try:
        problems.raise_if_any("Its weights and its config are not of one model: get both again")
    except ModelError as error:
        raise UsageError(f"{label}: {error}") from error
    # Older files hold buffers too that a module computes: those stay as they are.
    found = {info.name: landing.slot(info.name) for info in tensors}
    return {name: slot for name, slot in found.items() if slot is not None}


@dataclass(frozen=True)
class _Landed:
    """A tensor from a file of this disk, as the diffusion room takes them."""

    info: TensorInfo
    data: Any

    @property
    def path(self) -> str:
        return self.info.file.name

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape
