"""Seconds from a request for one model to a request for another, in an engine that serves several.

The engine this was written with serves one, and a request cannot name another: then there is nothing to measure.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def run() -> dict[str, Any]:
    """Why there are no seconds."""
    from diffusion.request import GenerationRequest

    if "model" not in {field.name for field in fields(GenerationRequest)}:
        return {"skipped": "a request cannot name a model: this engine serves one"}
    return {"skipped": "this engine serves several, and this program does not ask it for them yet"}
