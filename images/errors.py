"""What can go wrong between a finished image and its URL."""

from __future__ import annotations


class ImagesError(Exception):
    """Base of this room's errors; the message names the object, the cause and what to try."""


class RecordError(ImagesError):
    """A prediction's record could not be written, read or understood."""


class LostLeaseError(RecordError):
    """The prediction is another's by now, or already finished; what the caller has of it must not be recorded."""
