"""How a model is to be read, where that is anybody's choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HOST_RING = 96 * 1024 * 1024  # bytes; beside the model, in host memory
ReaderKind = Literal["auto", "thread", "process"]


@dataclass(frozen=True)
class ReadOptions:
    """The choices, with the defaults that suit most.

    Args:
        connections: pins their number; None lets it follow the rates that are seen.
        verify: False leaves BLAKE3 out, for measuring what it costs. Nothing that serves does that.
        reader: "thread" reads in this process, "process" in a child that no import here holds up; "auto" is a child
            over TLS where this process is `busy`, and threads otherwise.
        busy: whether other Python code runs in this process meanwhile, as the imports of a start do. Over TLS that
            holds threads up most: they need the interpreter for every 16 KiB.
        ring_bytes: the memory between a reading process and this one.
        cache_folder: where this node keeps files between loads; None: nowhere.
        cache_bytes: how much may lie there; None: as much as the disk takes.
        folder: where `pull` may have left the model, to be read instead of the bucket if it did; None: nowhere.
    """

    connections: int | None = None
    verify: bool = True
    reader: ReaderKind = "auto"
    busy: bool = False
    ring_bytes: int = HOST_RING
    cache_folder: Path | None = None
    cache_bytes: int | None = None
    folder: Path | None = None
