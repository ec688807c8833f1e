"""Passes as CUDA graphs: the some 1,850 launches of a denoiser's become one, so that a fast card waits for no host.

A graph is of one shape and reads and writes where it was recorded, so inputs are copied to it and its result away from
it. Weights may change where they lie (a refresh, another model); a denoiser whose tensors lie elsewhere needs others.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from diffusion.device import ran_out_of_memory

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]

# Libraries choose algorithms and take their workspaces in the first calls, which must not be part of a graph.
CALLS_BEFORE_RECORDING = 2

# Loading a compiled kernel waits for the whole card, which a recording neither lets happen nor survives, whichever
# thread it is on. So who loads some beside requests, and who records, do it one at a time.
one_records_or_loads = threading.Lock()


@dataclass(frozen=True)
class _Graph:
    graph: Any
    inputs: dict[str, torch.Tensor]
    output: Any

    def replay(self, batch: Batch) -> Any:
        for name, tensor in self.inputs.items():
            tensor.copy_(batch[name])
        self.graph.replay()
        # The next replay, of whatever graph, writes to the same memory.
        return _pytree.tree_map_only(torch.Tensor, torch.clone, self.output)


class Graphs:
    """Records graphs while told to (`recording`), and replays them. Whatever has none runs as it is.

    One thread uses it. All graphs share one pool of memory, and one place for inputs of one shape, since never two of
    them run at once.

    Args:
        of: what is recorded, for the log.
    """

    def __init__(self, device: torch.device, of: str = "a step") -> None:
        self._device = device
        self._of = of
        self._able = device.type == "cuda"
        self._recording = False
        self._anew = False
        self._waits = True
        self._owner: object | None = None
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._places: dict[tuple[object, ...], torch.Tensor] = {}
        self._refused: set[tuple[object, ...]] = set()  # for want of memory
        # One for all recordings: libraries keep a workspace for every stream that they have seen.
        self._beside: Any = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def forget(self) -> None:
        """Let go of all graphs, their memory, and whose they were. Nothing may be running."""
        self._graphs.clear()
        self._places.clear()
        self._refused.clear()
        self._owner = None
        self._pool = None

    @contextmanager
    def recording(self, *, anew: bool = False, waits: bool = True) -> Iterator[None]:
        """Inside, a pass of a shape that has no graph gets one; and one that has, another, if they are made anew.

        While compiled code is being loaded it `waits` for that, or runs as it is and has none yet.
        """
        self._recording, self._anew, self._waits = True, anew, waits
        try:
            yield
        finally:
            self._recording = self._anew = False

    def run(
        self, owner: object, predict: Callable[[Batch], Any], batch: Batch, kind: object
    ) -> Any:
        """`predict(batch)`, from a graph where there is one: a tensor, or what torch knows the tensors of.

        Args:
            owner: whose pass it is. With another one, the graphs of the one before are gone.
            kind: what `predict` depends on beside the batch's shapes.
        """
        if not self._able:
            return predict(batch)
        if owner is not self._owner:
            self.forget()
            self._owner = owner
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        key = (kind, shapes)
        found = self._graphs.get(key)
        if found is not None and not self._anew:
            return found.replay(batch)
        if (
            self._recording
            and key not in self._refused
            and one_records_or_loads.acquire(blocking=self._waits)
        ):
            try:
                self._record(predict, batch, key)
            finally:
                one_records_or_loads.release()
        return predict(batch)

    def _record(
        self,
        predict: Callable[[Batch], Any],
        batch: Batch,
        key: tuple[object, ...],
    ) -> None:
        reason: str | None = None
        full = False
        current = torch.cuda.current_stream(self._device)
        try:
            self._graphs[key] = self._recorded(predict, batch)
        except Exception as error:  # noqa: BLE001 - it is only about speed
            reason, full = str(error).partition("\n")[0], _ran_out_of_memory(error)
        finally:
            # Of a capture that failed torch reports the end before it leaves the stream, and so never leaves it.
            torch.cuda.set_stream(current)
        if reason is None:
            return
        if full:
            # The size may fit without, and other sizes with one.
            self._refused.add(key)
            logger.info(
                "No memory for a CUDA graph of %s of %s: that size runs without.",
                self._of,
                _named(batch),
            )
        else:
            self._able = False
            self.forget()
            logger.warning(
                "CUDA graphs are off for %s, which takes longer each time: recording one failed (%s).",
                self._of,
                reason,
            )
        # Only here, with the exception and its frames gone, is what they held free.
        torch.cuda.empty_cache()

    def _recorded(self, predict: Callable[[Batch], Any], batch: Batch) -> _Graph:
        inputs = {name: self._place(name, tensor).copy_(tensor) for name, tensor in batch.items()}
        if self._beside is None:
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside = self._beside
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            for _ in range(CALLS_BEFORE_RECORDING):
                predict(inputs)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads fetch pictures and load versions meanwhile; what they do is none of its business.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = predict(inputs)
        self._pool = graph.pool()
        return _Graph(graph, inputs, output)

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where graphs read an input: one place for all of them that have it in this shape, as a prompt's keys are."""
        key = (name, tensor.shape, tensor.dtype)
        if key not in self._places:
            self._places[key] = torch.empty_like(tensor)
        return self._places[key]


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether that is what began it: what follows from it inside a capture is an error about capturing."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, RuntimeError) and ran_out_of_memory(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def _named(batch: Batch) -> str:
    return "x".join(str(side) for side in next(iter(batch.values())).shape)
