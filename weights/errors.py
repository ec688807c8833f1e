"""What can go wrong between a bucket and memory, each with what was being done, to which object, what to try."""

from __future__ import annotations


class WeightsError(Exception):
    """Base of every error this room raises; the message is meant for the person who deploys."""


class BucketError(WeightsError):
    """A call to the bucket failed. `code` is S3's own ("NoSuchKey", "AccessDenied", …),
    "Unreachable" when it gave no answer, and "" when the answer itself was not usable."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def is_missing_or_hidden(self) -> bool:
        """S3 answers AccessDenied for an absent object when the keypair may not list."""
        return self.code in ("NoSuchKey", "AccessDenied")


class OversizedError(BucketError):
    """A small object, such as latest.json, is too large to be one."""


class ModelNotFoundError(WeightsError):
    """There is no such model, or no such version of it, in the bucket."""


class ManifestError(WeightsError):
    """A manifest (or latest.json) is not what this product writes, or names what it must not name."""


class CorruptObjectError(WeightsError):
    """Bytes arrived that are not the bytes that were published."""


class ObjectChangedError(WeightsError):
    """An object was replaced while it was being read."""


class FolderError(WeightsError):
    """A local folder cannot be published from, or written to."""


class OvertakenError(WeightsError):
    """A version was published whole, but is not served: somebody else had changed which one is."""
