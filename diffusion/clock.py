"""Seconds of work on a device, taken without waiting for it."""

import time
from dataclasses import dataclass, field

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Marks in the work given to `device` so far; on a card they are events, and the host goes on at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def mark(self) -> Mark:
        """This point in the device's work."""
        if self._device is None:
            return time.perf_counter()
        # Without `blocking`, whoever waits for it keeps a core busy that encodes pictures otherwise.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> None:
        """Until the device has got there."""
        if not isinstance(mark, float):
            mark.synchronize()


@dataclass
class Spent:
    """What one image took of the device, stage by stage. Read it only once the device is past all of it."""

    spans: list[tuple[str, Mark, Mark, int]] = field(default_factory=list)

    def add(self, stage: str, begun: Mark, ended: Mark, shared_by: int = 1) -> Mark:
        """Note a span; returns its end, where the next one may begin."""
        self.spans.append((stage, begun, ended, shared_by))
        return ended

    def seconds(self, stage: str) -> float:
        """Its share: a pass of four images is a quarter of a pass for each of them."""
        return sum(
            _between(begun, ended) / shared_by
            for name, begun, ended, shared_by in self.spans
            if name == stage
        )


def _between(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        assert isinstance(begun, float) and isinstance(ended, float)  # noqa: PT018, S101 - one clock made both
        return ended - begun
    milliseconds: float = begun.elapsed_time(ended)
    return milliseconds / 1000
