"""Compiled code read beside requests: every kind of region once, on another thread, with made-up numbers.

torch.compile reads a model's Python for seconds at every start, also where its caches have all that comes of it. Nobody
needs to wait for that: what was read on one thread is there for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

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
        return torch.zeros_like(
            torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        )


class Rehearsal:
    """The calls of a pass, one of each kind."""

    def __init__(self) -> None:
        self._calls: dict[object, tuple[Region, Any]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, region: Region, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A region was called so. Keeps nothing of the tensors."""
        call = _pytree.tree_map_only(torch.Tensor, _Tensor.of, (arguments, dict(named)))
        self._calls.setdefault((region.kind, repr(call)), (region, call))

    def run(self) -> None:
        """Have every kind's compiled code made ready for this process. Raises whatever compiling does."""
        from torch._dynamo import config

        with torch.inference_mode(), config.patch(recompile_limit=MOST_GRAPHS):
            for region, call in self._calls.values():
                arguments, named = _pytree.tree_map_only(_Tensor, _Tensor.made, call)
                region.run_compiled(*arguments, **named)
