"""Taking a single-file checkpoint apart: one component at a time becomes diffusers' own files.

What belongs where is diffusers' knowledge: each component is mapped by the functions that `from_single_file` uses,
and written under the names that published models have. The file stays mapped, so a component's tensors take memory
only where they are changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.families import Architecture
from preparation import convert
from preparation.convert import TensorInfo
from preparation.errors import UsageError
from preparation.origin import OnBytes

_NAMES = {full: short for short, full in convert.TORCH_NAMES.items()} | {"float64": "F64"}


def unpack(
    file: Path,
    component: str,
    architecture: Architecture,
    configs: Path,
    target: Path,
    *,
    stem: str,
    dtype: str | None,
    shard_limit: int,
    label: str,
    on_bytes: OnBytes,
) -> list[Path]:
    """Write one component of the checkpoint `file` into the folder `target`, in shards; returns their paths in order.

    `configs` is a folder with the component's own, as a diffusers model's. The tensors become `dtype` (safetensors'
    name), or where that is None what `convert.unpacked_dtype` says.

    Raises:
        UsageError: the file does not hold the component that the config describes, or a value does not fit the dtype.
        PreparationError: the file is damaged, or the disk refuses.
    """
    held = _held(file, architecture.single_file.prefixes[component], label)
    own = convert.unpacked_dtype(held)
    names = [info.name for info in held]
    tensors = _load(file, names, component, architecture, configs, own, label)
    infos = [
        TensorInfo(
            file, name, _NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
        )
        for name, tensor in tensors.items()
    ]
    dtype = dtype or own
    shards = convert.plan_shards(infos, dtype, shard_limit)
    target.mkdir(parents=True)
    convert.write_shards(
        shards, target, stem, dtype=dtype, label=label, on_bytes=on_bytes, changed=tensors
    )
    return [
        target / convert.shard_name(stem, number, len(shards))
        for number in range(1, len(shards) + 1)
    ]


def _held(file: Path, prefix: str, label: str) -> list[TensorInfo]:
    return [info for info in convert.read_headers([file], label) if info.name.startswith(prefix)]


def _load(
    file: Path,
    names: list[str],
    component: str,
    architecture: Architecture,
    configs: Path,
    dtype: str,
    label: str,
) -> dict[str, Any]:
    """The component's parameters by the names that published files give them."""
    import torch
    from safetensors import safe_open

    library, class_name = architecture.modules[component]
    torch_dtype = getattr(torch, convert.TORCH_NAMES[dtype])
    take = _of_diffusers if library == "diffusers" else _of_transformers
    with convert.reading(file, label), safe_open(file, framework="pt") as opened:
        own = {name: opened.get_tensor(name) for name in names}
    with _explained(label):
        found = take(class_name, own, component, configs, torch_dtype, label)
        # Writing casts, and looks for values that do not fit; 8 bits it does not know.
        return {
            name: tensor.to(torch_dtype) if tensor.element_size() == 1 else tensor
            for name, tensor in found.items()
        }


def _of_diffusers(
    class_name: str,
    tensors: dict[str, Any],
    component: str,
    configs: Path,
    _torch_dtype: Any,
    label: str,
) -> dict[str, Any]:
    """As `from_single_file` of the class maps them, which then leaves aside what the class has no use for."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    model_class = getattr(diffusers, class_name)
    config = model_class.load_config(str(configs), subfolder=component, local_files_only=True)
    with torch.device("meta"):
        expected = model_class.from_config(config).state_dict()
    mapped = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"](
        config=config, checkpoint=tensors
    )
    for name, value in expected.items():
        if name not in mapped:
            raise _MisfitError(f"{label} has no {name}, which its config describes")
        if mapped[name].shape != value.shape:
            raise _MisfitError(
                f"{label}: {name} has the shape {tuple(mapped[name].shape)} where its config gives {tuple(value.shape)}"
            )
    return {name: mapped[name] for name in expected}


def _of_transformers(
    class_name: str,
    tensors: dict[str, Any],
    component: str,
    configs: Path,
    torch_dtype: Any,
    label: str,
) -> dict[str, Any]:
    """As diffusers builds the text encoder of a single file."""
    import transformers
    from diffusers.loaders import single_file_utils

    is_clip = class_name.startswith("CLIP")
    create = (
        single_file_utils.create_diffusers_clip_model_from_ldm
        if is_clip
        else single_file_utils.create_diffusers_t5_model_from_checkpoint
    )
    try:
        module = create(
            getattr(transformers, class_name),
            checkpoint=tensors,
            subfolder=component,
            config=str(configs),
            torch_dtype=torch_dtype,
            local_files_only=True,
        )
    except NotImplementedError as error:  # of torch, for a parameter that stayed without a value
        raise _MisfitError(f"{label} lacks tensors that its config describes") from error
    tied = getattr(module, "all_tied_weights_keys", {})  # another name of a parameter that is there
    found = {name: value for name, value in module.state_dict().items() if name not in tied}
    if absent := next((name for name, value in found.items() if value.is_meta), None):
        raise _MisfitError(f"{label} has no {absent}, which its config describes")
    return {_published(name): value for name, value in found.items()} if is_clip else found


def _published(name: str) -> str:
    """Newer classes of transformers have dropped a prefix that all published CLIP files carry."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


class _MisfitError(Exception):
    """What is wrong with a component, without the advice."""


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turns misfits, and whatever diffusers makes of tensors that no config describes, into a UsageError."""
    advice = "Is the file whole, and of its configs' family? --base names another model to take them from."
    try:
        yield
    except _MisfitError as error:
        raise UsageError(f"{error}. {advice}") from error
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". If you ")[0]
        raise UsageError(
            f"{label} does not fit its config ({type(error).__name__}: {reason}). {advice}"
        ) from error
