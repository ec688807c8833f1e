"""The denoiser's pass as CUDA graphs: some 1,850 launches become one, so that a fast card does not wait for the host.

A graph is of one shape and reads and writes where it was recorded, so inputs are copied to it and its result away from
it. Weights may change where they lie (a refresh, another model); a denoiser whose tensors lie elsewhere needs others.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]

# Libraries choose algorithms and take their workspaces in the first calls, which must not be part of a graph.
CALLS_BEFORE_RECORDING = 2


@dataclass(frozen=True)
class _Graph:
    graph: Any
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor

    def replay(self, batch: Batch) -> torch.Tensor:
        for name, tensor in self.inputs.items():
            tensor.copy_(batch[name])
        self.graph.replay()
        # The next replay, of whatever graph, writes to the same memory.
        return self.output.clone()


class Graphs:
    """Records graphs while told to (`recording`), and replays them. Whatever has none runs as it is.

    One thread uses it. All graphs share one pool of memory, since never two of them run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._able = device.type == "cuda"
        self._recording = False
        self._owner: object | None = None
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, a pass of a shape that has no graph gets one."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def run(
        self, owner: object, predict: Callable[[Batch], torch.Tensor], batch: Batch, kind: object
    ) -> torch.Tensor:
        """`predict(batch)`, from a graph where there is one.

        Args:
            owner: whose pass it is. With another one, the graphs of the one before are gone.
            kind: what `predict` depends on beside the batch's shapes.
        """
        if not self._able:
            return predict(batch)
        if owner is not self._owner:
            self._graphs.clear()
            self._owner = owner
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        found = self._graphs.get((kind, shapes))
        if found is not None:
            return found.replay(batch)
        if self._recording:
            self._record(predict, batch, (kind, shapes))
        return predict(batch)

    def _record(
        self,
        predict: Callable[[Batch], torch.Tensor],
        batch: Batch,
        key: tuple[object, ...],
    ) -> None:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        try:
            beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(beside):
                for _ in range(CALLS_BEFORE_RECORDING):
                    predict(inputs)
            torch.cuda.current_stream(self._device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads fetch pictures and load versions meanwhile; what they do is none of its business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = predict(inputs)
        except torch.OutOfMemoryError:
            # The size may fit without, and other sizes with one.
            logger.info("No memory for a CUDA graph of %s: that size runs without.", _named(batch))
            torch.cuda.empty_cache()
            return
        except RuntimeError as error:
            self._able = False
            self._graphs.clear()
            logger.warning(
                "CUDA graphs are off, and every pass takes longer: recording one failed (%s).",
                str(error).partition("\n")[0],
            )
            return
        self._pool = graph.pool()
        self._graphs[key] = _Graph(graph, inputs, output)


def _named(batch: Batch) -> str:
    return "x".join(str(side) for side in batch["sample"].shape)
