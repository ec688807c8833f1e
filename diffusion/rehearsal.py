"""The calls of a pass, one of each kind, to be made again with made-up numbers: that is how compiled code is read.

torch.compile reads a model's Python for seconds at every start, also where its caches have all that comes of it. Nobody
needs to wait for that: what was read on one thread is there for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from diffusion.graphs import one_records_or_loads
from diffusion.regions import Region

# Graphs of one function: kinds of blocks, times token counts, times batches. torch's own limit of 8 is there to notice
# code that compiles for ever, which a closed set of shapes does not.
MOST_GRAPHS = 128


@dataclass(frozen=True)
class _Tensor:
    """All of a tensor but its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Tensor:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def made(self) -> torch.Tensor:
        """Zeros that lie as it does, also where that is not dense."""
        steps = zip(self.shape, self.strides, strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        memory = torch.zeros(max(extent, 1), dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Call:
    """One region, and what it was called with, all but the numbers."""

    region: Region
    arguments: Any

    def make(self) -> None:
        """Have the compiled code for it ready in this process, while nobody records. Raises whatever compiling does."""
        from torch._dynamo import config

        recompile = config.patch(recompile_limit=MOST_GRAPHS)
        with one_records_or_loads, torch.inference_mode(), recompile:
            # Inside too: tensors made elsewhere are of another kind, which code is compiled for anew.
            arguments, named = _pytree.tree_map_only(_Tensor, _Tensor.made, self.arguments)
            self.region.run_compiled(*arguments, **named)


class Rehearsal:
    """What was noted of a pass."""

    def __init__(self) -> None:
        self._calls: dict[object, Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(self._calls.values())

    def note(self, region: Region, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A region was called so. Keeps nothing of the tensors."""
        call = _pytree.tree_map_only(torch.Tensor, _Tensor.of, (arguments, dict(named)))
        self._calls.setdefault((region.kind, repr(call)), Call(region, call))
