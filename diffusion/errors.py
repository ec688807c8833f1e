"""What can go wrong in this room. Every message says what was being done, to which object, and what to try."""


class DiffusionError(Exception):
    """Base of every error this room raises on purpose."""


class RequestError(DiffusionError):
    """The caller asked for something this checkpoint cannot do; asking differently helps."""


class ModelError(DiffusionError):
    """The model's folder, recipe or tensors are wrong; no request can help until the model is fixed."""


class DeviceError(DiffusionError):
    """The device or dtype asked for is not to be had on this machine."""


class OutOfMemoryError(DiffusionError):
    """The device ran out of memory on one image. What it took is freed, and the engine goes on."""


class BusyError(DiffusionError):
    """Requests under way kept the model for too long for it to be replaced. It goes on serving; try again later."""


class NonFiniteError(DiffusionError):
    """An image came out as NaN or infinity, which would have been shown as plain black."""


class CompileError(DiffusionError):
    """Nothing can be compiled here, or compiled code cannot be kept or loaded. Everything runs without as well."""
