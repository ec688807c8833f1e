"""Safetensors to safetensors: splitting into shards, casting to another dtype, and checking against a model's config.

Works one shard at a time, so memory stays at about one shard however large the model. Knows nothing of where the
files came from or where they go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from preparation.errors import PreparationError, UsageError
from preparation.origin import OnBytes
from weights.safetensors_layout import DTYPE_BYTES

# Caches in front of S3 (TAG, for one) refuse objects over 1 GiB.
SHARD_LIMIT = 960 * 1000 * 1000  # bytes of tensors; the header adds well under a megabyte

TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it."""

    file: Path
    name: str
    dtype: str  # safetensors' own name: "F16"
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        count = 1
        for edge in self.shape:
            count *= edge
        return count

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.count * DTYPE_BYTES[self.dtype]

    def size_as(self, dtype: str | None) -> int:
        """Bytes after a cast; only floating point is cast."""
        return self.count * DTYPE_BYTES[dtype] if dtype and self.dtype in _FLOATS else self.size


def read_headers(files: Iterable[Path], label: str) -> list[TensorInfo]:
    """Every tensor of a weight set, in the order the files hold them.

    Raises:
        PreparationError: a file is no intact safetensors file, or two files hold the same tensor.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        with reading(file, label), safe_open(file, framework="np") as tensors:
            for name in tensors.offset_keys():
                view = tensors.get_slice(name)
                info = TensorInfo(file, name, view.get_dtype(), tuple(view.get_shape()))
                if info.dtype not in DTYPE_BYTES:
                    raise UsageError(
                        f"{label}: tensor {name} has the unsupported dtype {info.dtype}."
                    )
                if name in found:
                    raise UsageError(
                        f"{label}: tensor {name} is in {found[name].file.name} and in {file.name}."
                    )
                found[name] = info
    return list(found.values())


def needs_cast(tensors: Iterable[TensorInfo], dtype: str | None) -> bool:
    """Whether any floating-point tensor is of another dtype than wanted (None: any will do)."""
    return dtype is not None and any(
        tensor.dtype in _FLOATS and tensor.dtype != dtype for tensor in tensors
    )


def plan_shards(
    tensors: Sequence[TensorInfo], dtype: str | None, limit: int = SHARD_LIMIT
) -> list[list[TensorInfo]]:
    """Fill shards in order, none over `limit` bytes unless it is a single tensor."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.size_as(dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def shard_name(stem: str, number: int, count: int) -> str:
    """As diffusers and transformers name them; a lone shard carries no number."""
    return (
        f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
    )


def write_index(
    folder: Path, stem: str, shards: Sequence[Sequence[TensorInfo]], dtype: str | None
) -> None:
    """Write the `.safetensors.index.json` by which diffusers and transformers find a tensor's shard."""
    weight_map = {
        tensor.name: shard_name(stem, number, len(shards))
        for number, shard in enumerate(shards, start=1)
        for tensor in shard
    }
    total = sum(tensor.size_as(dtype) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def write_shards(
    shards: Sequence[Sequence[TensorInfo]],
    folder: Path,
    stem: str,
    *,
    dtype: str | None,
    label: str,
    on_bytes: OnBytes,
    changed: MutableMapping[str, Any] | None = None,
) -> None:
    """Write the shards, with their index where there is more than one; `on_bytes` hears of bytes read.

    `changed` holds tensors to be written instead of those in the files, by their names. It is emptied, so that memory
    holds none beside its cast: a component fused in float32 and a full shard of it are more than that component and
    1 GiB.

    Raises:
        UsageError: a value does not fit into `dtype`.
        PreparationError: a source is damaged, or the disk refuses.
    """
    from safetensors.torch import save_file

    for number, shard in enumerate(shards, start=1):
        tensors: dict[str, Any] = {}
        with ExitStack() as stack:
            sources: dict[Path, Any] = {}
            for info in shard:
                if changed is not None and info.name in changed:
                    tensors[info.name] = _cast(changed.pop(info.name), info, dtype, label)
                    on_bytes(info.size)
                    continue
                with reading(info.file, label):
                    if info.file not in sources:
                        sources[info.file] = stack.enter_context(
                            safe_open(info.file, framework="pt")
                        )
                    tensors[info.name] = _cast(
                        sources[info.file].get_tensor(info.name), info, dtype, label
                    )
                on_bytes(info.size)
            target = folder / shard_name(stem, number, len(shards))
            with _writing(target):
                save_file(tensors, target, metadata={"format": "pt"})
    if len(shards) > 1:
        write_index(folder, stem, shards, dtype)


def check_architecture(
    tensors: Iterable[TensorInfo], config: Mapping[str, Any], class_name: str, label: str
) -> None:
    """Compare names and shapes with the model that `config` describes, built on the meta device without memory.

    Raises:
        UsageError: a tensor is missing, unknown, of another shape, or no floating point.
    """
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, class_name).from_config(dict(config))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {tensor.name: tensor for tensor in tensors}
    for problem, names in (
        ("misses", sorted(expected.keys() - found.keys())),
        ("has the unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"{label} {problem} tensor {names[0]}{more}, compared with its {class_name} config. "
                "Has the repo changed its layout? Try an earlier --revision."
            )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UsageError(
                f"{label}: tensor {name} has shape {found[name].shape} where its {class_name} config "
                f"gives {shape}. Has the repo changed its layout? Try an earlier --revision."
            )
        if found[name].dtype not in _FLOATS:
            raise UsageError(f"{label}: tensor {name} is {found[name].dtype}, not floating point.")


def dominant_dtype(tensors: Iterable[TensorInfo]) -> str | None:
    """The floating-point dtype that holds most of the bytes; None where there is none."""
    bytes_by_dtype: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in _FLOATS:
            bytes_by_dtype[tensor.dtype] = bytes_by_dtype.get(tensor.dtype, 0) + tensor.size
    return max(bytes_by_dtype, key=bytes_by_dtype.__getitem__, default=None)


def unpacked_dtype(tensors: Iterable[TensorInfo]) -> str:
    """What a component of a single file is written in: the floats that hold most of its bytes, 8 bits as float16.

    float16 holds every value of both kinds of 8 bits; float64 becomes float32.
    """
    bytes_by_dtype: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype.startswith(("F", "BF")):
            dtype = {"F8_E4M3": "F16", "F8_E5M2": "F16", "F64": "F32"}.get(
                tensor.dtype, tensor.dtype
            )
            bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + tensor.size
    return max(bytes_by_dtype, key=bytes_by_dtype.__getitem__, default="F32")


def _cast(tensor: Any, info: TensorInfo, dtype: str | None, label: str) -> Any:
    import torch

    if dtype is None or info.dtype == dtype or info.dtype not in _FLOATS:
        return tensor
    cast = tensor.to(getattr(torch, TORCH_NAMES[dtype]))
    if not is_finite(cast) and is_finite(tensor):
        raise UsageError(
            f"{label}: tensor {info.name} has values too large for {TORCH_NAMES[dtype]}."
        )
    return cast


def is_finite(tensor: Any) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity."""
    import torch

    # Either end is NaN where any number is. `isfinite().all()` takes eight times as long: 19 s for SDXL's 6.9 GB.
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))


@contextmanager
def reading(file: Path, label: str) -> Iterator[None]:
    """Turn what a damaged file raises into a PreparationError that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise PreparationError(
            f"{label}: {file.name} cannot be read as safetensors ({error}). It may be cut short: "
            f"delete {file.resolve()} and get it again."
        ) from error


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise PreparationError(
            f"Writing {target}: {error}. Is the disk full? --destdir chooses another."
        ) from error
