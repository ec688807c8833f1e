"""Which device to run on, and in which dtype: what was asked for, or the best this machine has. And when it is full."""

import torch

from diffusion.errors import DeviceError

# Beside the weights while they come in: what is being cast, what waits for its module, and what fragments take.
LANDING_MARGIN = 2 * 2**30

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(asked: str = "auto") -> torch.device:
    """CUDA where there is a card, else the CPU; or the device asked for, as torch names it ("cuda", "cuda:1", "cpu").

    Raises `DeviceError` when that device is absent, or is a card this build of torch has no kernels for.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"{asked!r} is not a device; use auto, cuda or cpu.") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"The device {asked!r} is not supported; use auto, cuda or cpu.")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"The device {asked!r} was asked for, but torch {torch.__version__} finds no CUDA card here. Check that "
            "the container was started with its GPU (nvidia-smi shows it), or ask for auto or cpu."
        )
    # torch types the index as always there; a bare "cuda" has none.
    index: int | None = device.index
    if index is not None and index >= torch.cuda.device_count():
        raise DeviceError(
            f"The device {asked!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA card(s), "
            "counted from cuda:0."
        )
    _check_kernels(device)
    return device


def choose_dtype(device: torch.device, asked: str = "auto") -> torch.dtype:
    """bfloat16 where the card computes it natively, else float16; float32 on the CPU. Or the dtype asked for.

    bfloat16 has float32's range, so nothing overflows. Cards before Ampere (compute capability 8.0) only emulate it,
    slowly. Raises `DeviceError` for a dtype that is unknown or would be emulated.
    """
    if asked == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float16
    if asked not in _DTYPES:
        raise DeviceError(f"{asked!r} is not a dtype; use auto, {', '.join(_DTYPES)}.")
    if asked == "bfloat16" and device.type == "cuda" and not _computes_bfloat16(device):
        raise DeviceError(
            f"bfloat16 was asked for, but {torch.cuda.get_device_name(device)} only emulates it; use auto or float16."
        )
    return _DTYPES[asked]


def ran_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator and cuBLAS have no error class of their own for it.
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _computes_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _check_kernels(device: torch.device) -> None:
    # A card can be present and still too old for this build: CUDA 13 builds of torch no longer run on Volta.
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} is here, but torch {torch.__version__} cannot run on it ({error}). "
            "Rent a newer card, install a torch built for this one, or ask for cpu."
        ) from error


def free_bytes(device: torch.device) -> int:
    """What this process can have of a card, what torch holds already included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device)


def has_room_to_land(free: int, weights: int) -> bool:
    """Whether all weights can come to lie on a card at once, before any module says where it is to stay."""
    return free >= weights + LANDING_MARGIN
