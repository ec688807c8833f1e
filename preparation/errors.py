"""What preparing a model can fail with. Each message says what was being done, to which object, and what to try."""


class PreparationError(Exception):
    """Something failed that is not the caller's doing: the network, the disk, a damaged file."""

    exit_code = 1


class UsageError(PreparationError):
    """The caller asked for something that cannot be done; the message says what to ask for instead."""

    exit_code = 2


class CancelledStageError(PreparationError):
    """A worker thread stopped because the whole preparation was interrupted. Never shown: Ctrl-C is reported once."""

    exit_code = 130
