"""What reading took, as plain numbers that logs and metrics can take as they are."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass
class Counters:
    """Bytes, counts, and seconds summed over threads; all of them only grow. Safe to add to from many threads."""

    total_bytes: int = 0  # to be read
    landed_bytes: int = 0  # verified, from wherever they came
    network_bytes: int = 0  # received, also those that had to be received again
    cache_bytes: int = 0  # taken from the node's cache
    folder_bytes: int = 0  # taken from a folder that the model was pulled to
    requests: int = 0
    retries: int = 0
    stalls: int = 0
    throttled: int = 0
    corrupt_chunks: int = 0
    hedges: int = 0
    hedges_won: int = 0
    connections: int = 0  # at once, at most
    hash_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, float]:
        with self._lock:
            return {
                item.name: getattr(self, item.name) for item in fields(self) if item.name[0] != "_"
            }
