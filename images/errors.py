"""What can go wrong between a finished image and its URL."""

from __future__ import annotations


class ImagesError(Exception):
    """Base of this room's errors; the message names the object, the cause and what to try."""
