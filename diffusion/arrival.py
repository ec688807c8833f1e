"""A card's memory as the place where streamed tensors come to lie, reached through pinned host memory.

Bytes are copied from the pinned ring to the card by the card itself, beside everything else that goes on; a slot of
the ring is free again as soon as the card has read it. So the host holds the ring and not the model.
"""

import ctypes
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusion.dtypes import DTYPES
from diffusion.errors import ModelError

logger = logging.getLogger(__name__)


class TensorPlace(Protocol):
    """What a file's header says of one tensor, as the weights room hands it over."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass
class _Target:
    """One tensor on the card. It gets its memory with its first bytes, so that what is being cast is all there is."""

    place: TensorPlace
    tensor: torch.Tensor | None = None


class CardMemory:
    """Where tensors come to lie on `device`. A context manager: leaving it waits for the copies and unpins the ring.

    Args:
        ring: the host memory that pieces arrive in, pinned while this is open. Where it cannot be pinned (a limit on
            locked memory), copies go through the driver's own pinned memory, and a warning says so.
    """

    def __init__(self, device: torch.device, ring: Any | None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._error: RuntimeError | None = None
        self._pinned = None if ring is None else _pin(ring)
        self._under_way: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        # Waiting for the card is a thread's work: the ring may be full, and then no further piece comes to notice.
        self._releasing = threading.Thread(target=self._release, name="card-copies", daemon=True)
        self._releasing.start()

    def __enter__(self) -> "CardMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the copies under way and unpin the ring."""
        self._under_way.put(None)
        self._releasing.join()
        if self._pinned is not None:
            torch.cuda.synchronize(self._device)
            _runtime().cudaHostUnregister(ctypes.addressof(self._pinned))
            self._pinned = None

    def reserve(self, path: str, places: Sequence[TensorPlace]) -> list[_Target]:
        """Raises ModelError for a dtype that torch has no plain tensors of."""
        for place in places:
            if place.dtype not in DTYPES:
                raise ModelError(
                    f"{path}: {place.name} is {place.dtype}, which is not supported. Publish the model again in "
                    "float16 or bfloat16."
                )
        return [_Target(place) for place in places]

    def put(
        self, parts: Sequence[tuple[_Target, int, memoryview]], release: Callable[[], None]
    ) -> None:
        """Start copying the parts; `release` is called, from another thread, when the card has read them."""
        self._raise_error()
        with torch.cuda.device(self._device):
            for target, offset, piece in parts:
                raw = self._tensor(target).flatten().view(torch.uint8)
                source = torch.frombuffer(piece, dtype=torch.uint8)
                with torch.cuda.stream(self._stream):
                    raw[offset : offset + len(piece)].copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._under_way.put((done, release))

    def hand_over(self, target: _Target) -> torch.Tensor:
        """The finished tensor, in its file's dtype. Work given to the card from now on sees all of it."""
        self._raise_error()
        tensor = self._tensor(target)
        target.tensor = None
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_stream(self._stream)
        return tensor

    def _raise_error(self) -> None:
        if self._error is not None:
            raise ModelError(
                f"The card {self._device} failed while weights were copied to it ({self._error}). Start the server "
                "anew, on another card if it stays."
            ) from self._error

    def _tensor(self, target: _Target) -> torch.Tensor:
        if target.tensor is None:
            place = target.place
            count = torch.Size(place.shape).numel()
            with torch.cuda.device(self._device):
                flat = torch.empty(count, dtype=DTYPES[place.dtype], device=self._device)
                # The memory may have been another tensor's, whose last use the copies must not overtake.
                self._stream.wait_stream(torch.cuda.current_stream())
            target.tensor = flat.view(place.shape)
        return target.tensor

    def _release(self) -> None:
        while (copied := self._under_way.get()) is not None:
            done, release = copied
            try:
                done.synchronize()
            except RuntimeError as error:  # the card is lost: whoever puts or takes next is told
                self._error = error
            release()


def _pin(ring: Any) -> ctypes.c_char | None:
    """Pin the memory where it is; None where that is not allowed.

    What is returned is its first byte, and keeps the memory mapped for as long as it is kept.
    """
    first = ctypes.c_char.from_buffer(ring)
    outcome = _runtime().cudaHostRegister(ctypes.addressof(first), len(ring), 0)
    if int(outcome) == 0:
        return first
    logger.warning(
        "the %d MiB that weights pass through cannot be pinned (%s): copies to the card are slower. Raise the "
        "container's limit on locked memory (ulimit -l), or lower MODEL_RING_MIB",
        len(ring) // 2**20,
        outcome,
    )
    return None


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
