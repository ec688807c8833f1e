"""Host memory that a card can copy from by itself (pinned), for tensors that wait there."""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import nn

logger = logging.getLogger(__name__)

# torch's own allocator's; tensors begin at its multiples.
ALIGNMENT = 64


def rooms_like(places: Sequence[torch.Tensor], *, pinned: bool) -> Iterator[torch.Tensor]:
    """Host memory for tensors like these, laid out as they are.

    All in one piece, since of pieces torch pins up to twice as much. Where that cannot be pinned it is plain, and a
    warning says so.
    """
    sizes = [-(-place.nbytes // ALIGNMENT) * ALIGNMENT for place in places]
    memory = _memory(sum(sizes), pinned=pinned)
    offset = 0
    for place, size in zip(places, sizes, strict=True):
        flat = memory[offset : offset + place.nbytes].view(place.dtype)
        yield flat.as_strided(place.shape, torch.empty_like(place, device="meta").stride())
        offset += size


def pin(module: nn.Module) -> None:
    """Have a module that stays on the host lie in memory that a card copies from by itself, and beside other work."""
    tensors = [*module.parameters(), *module.buffers()]
    for tensor, room in zip(tensors, rooms_like(tensors, pinned=True), strict=True):
        tensor.data = room.copy_(tensor.detach())


def _memory(size: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning(
                "%.1f GB of host memory cannot be pinned (%s): copies to the card take longer. Raise the container's "
                "limit on locked memory (ulimit -l).",
                size / 1e9,
                str(error).partition("\n")[0],
            )
    return torch.empty(size, dtype=torch.uint8)
