"""Stands in for NVIDIA's driver library as `pynvml` gives it, on machines without a card: it answers what it is told.

Only the calls that gateway/gpu.py makes, with the real names, types of answers and kind of error.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml


@dataclass
class Driver:
    """Two cards, the second of which is a part of one (MIG): it tells its memory and not its use."""

    NVMLError = pynvml.NVMLError

    starts: bool = True
    used: list[int] = field(default_factory=lambda: [30 * 2**30, 5 * 2**30])
    lost: set[int] = field(default_factory=set)
    answers: threading.Event = field(default_factory=threading.Event)
    """Cleared, it hangs in the next call."""
    calls: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.answers.set()

    def nvmlInit(self) -> None:  # noqa: N802 - NVIDIA's names
        if not self.starts:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.stopped.set()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.calls += 1
        self.answers.wait()
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=self.used[handle], total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=75, memory=20)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA L4"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"
