"""What the machine's NVIDIA cards say of themselves: memory and use, asked of the driver (NVML).

Without a card, a driver or its library there is nothing to say, and nobody is bothered. A driver can hang, and
starting it can take seconds: a thread of its own asks it, and whoever reads waits for that thread a moment at most.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 0.05
"""A healthy driver answers in a few milliseconds."""
STALE_AFTER_S = 60.0
"""An older reading says nothing about now."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """One card as the driver sees it; None is what it does not tell, such as the use of a part of a card (MIG)."""

    index: int
    name: str
    uuid: str
    memory_used: int | None
    memory_total: int | None
    utilization: float | None
    """Part of the last second or less in which anything ran on it, 0 to 1."""


class Cards:
    """All cards of this machine. `read()` never raises and never takes long."""

    def __init__(
        self,
        load: Callable[[], Any] | None = None,
        *,
        patience_s: float = PATIENCE_S,
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        """`load` gives what speaks NVML; without it, the module `pynvml`."""
        self._load = load or _pynvml
        self._patience_s = patience_s
        self._stale_after_s = stale_after_s
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked = False
        self._closed = False
        self._cards: tuple[Card, ...] = ()
        self._read_at = time.monotonic()

    def read(self) -> tuple[Card, ...]:
        """What they say now, or said lately where the driver is slow to answer.

        While it owes an answer to an earlier call nobody waits for it again.
        """
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
                self._thread.start()
            if not self._asked and not self._closed:
                self._asked = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._asked, self._patience_s)
            fresh = time.monotonic() - self._read_at <= self._stale_after_s
            return self._cards if fresh else ()

    def close(self) -> None:
        """Ask nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._answer()
        finally:
            with self._changed:
                self._closed, self._asked, self._cards = True, False, ()
                self._changed.notify_all()

    def _answer(self) -> None:
        try:
            nvml = self._load()
        except ImportError:
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            _log.debug("no figures of a card: %s", error)
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._closed)
                if self._closed:
                    break
            cards = _cards(nvml)
            with self._changed:
                self._cards, self._read_at, self._asked = cards, time.monotonic(), False
                self._changed.notify_all()
        _told(nvml, nvml.nvmlShutdown)


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _cards(nvml: Any) -> tuple[Card, ...]:
    found = []
    for index in range(_told(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _told(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        memory = _told(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = _told(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        found.append(
            Card(
                index,
                str(_told(nvml, nvml.nvmlDeviceGetName, handle) or "unknown"),
                str(_told(nvml, nvml.nvmlDeviceGetUUID, handle) or ""),
                None if memory is None else int(memory.used),
                None if memory is None else int(memory.total),
                None if rates is None else rates.gpu / 100,
            )
        )
    return tuple(found)


def _told(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where the driver has none: a lost card, no permission, nothing it can measure."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None
