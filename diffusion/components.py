"""The parts of a pipeline, from a model's config files: modules without weights, tokenizers, a scheduler.

Only the classes that families names are ever built: a config chooses among them and cannot make anything else be
imported.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusion.errors import ModelError
from diffusion.families import Architecture, Class
from diffusion.recipe import SchedulerRecipe, read_config

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def parts_of(configs: Mapping[str, bytes], architecture: Architecture) -> frozenset[str]:
    """The modules and tokenizers that the model has; those it may lack are left out where it says so.

    Raises `ModelError` unless model_index.json names, for every part, a class that this room builds.
    """
    index = read_config(configs, "model_index.json")
    present = set()
    for name in (*architecture.modules, *architecture.tokenizers):
        entry = index.get(name)
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if class_name is None and name in architecture.optional:
            continue
        allowed = _allowed_names(architecture, name)
        if class_name not in allowed:
            raise ModelError(
                f"model_index.json of the model asks for {name} to be {entry!r}; only {allowed[0]} is supported. "
                f"Publish a {architecture.pipeline} made of stock parts."
            )
        present.add(name)
    return frozenset(present)


def _allowed_names(architecture: Architecture, name: str) -> tuple[str, ...]:
    if name in architecture.modules:
        return (architecture.modules[name][1],)
    # The "fast" name is what older files say; transformers 5 has one class under both.
    kind = architecture.tokenizers[name].kind
    return kind, f"{kind}Fast"


def build_module(name: str, kind: Class, configs: Mapping[str, bytes]) -> nn.Module:
    """A module of that class from its config.json, its parameters on the meta device, its computed buffers real."""
    path = f"{name}/config.json"
    config = read_config(configs, path)
    if config.get("quantization_config"):
        raise ModelError(f"{path} says the weights are quantized; publish the model in plain fp16.")
    library, class_name = kind
    module_class = getattr(_LIBRARIES[library], class_name)
    try:
        # Buffers that no file holds (CLIP's position ids) are computed by the constructor, so they must be real.
        with init_empty_weights(include_buffers=False):
            module: nn.Module = (
                module_class(_text_config(module_class, config))
                if issubclass(module_class, PreTrainedModel)
                else module_class.from_config(config)
            )
    except Exception as e:  # whatever a constructor makes of values that make no sense to it
        raise ModelError(
            f"No {class_name} can be built from {path} of the model ({type(e).__name__}: {e}). "
            "Compare it with the original's."
        ) from e
    module.eval().requires_grad_(False)
    return module


def _text_config(module_class: Any, config: Mapping[str, Any]) -> Any:
    # A config may name the attention code to run, downloaded kernels included; the stock default is the only one here.
    plain = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in ("attn_implementation", "auto_map")
    }
    return module_class.config_class.from_dict(plain, attn_implementation="sdpa")


def build_tokenizer(
    name: str, kind: str, configs: Mapping[str, bytes], *, max_tokens: int
) -> PreTrainedTokenizerBase:
    """A tokenizer of that class from its few small files, which it reads only from a folder.

    It cuts prompts at `max_tokens`, what its text encoder reads, or before, where its config says so.
    """
    files = {
        file: configs[path] for file in _TOKENIZER_FILES if (path := f"{name}/{file}") in configs
    }
    if not files.keys() & {"vocab.json", "tokenizer.json"}:
        raise ModelError(
            f"The model has no {name}/vocab.json or tokenizer.json; publish a complete diffusers folder."
        )
    try:
        with TemporaryDirectory(prefix="tokenizer-") as folder:
            for file, content in files.items():
                Path(folder, file).write_bytes(content)
            tokenizer: PreTrainedTokenizerBase = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True
            )
    except Exception as e:  # the Rust tokenizers raise no narrower one for a malformed file
        raise ModelError(
            f"The files under {name}/ of the model make no {kind} ({type(e).__name__}: {e}). "
            "Compare them with the original's."
        ) from e
    # Without model_max_length in its config, transformers makes this 10^30, which overflows at the first prompt.
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens)
    return tokenizer


def build_scheduler(recipe: SchedulerRecipe, configs: Mapping[str, bytes]) -> Any:
    """The recipe's scheduler: the folder's own config, with what the recipe sets put over it."""
    config = read_config(configs, "scheduler/scheduler_config.json") | recipe.config
    # `SchedulerRecipe` holds class_name to a closed list of diffusers' own.
    scheduler_class = getattr(diffusers, recipe.class_name)
    try:
        return scheduler_class.from_config(config)
    except Exception as e:
        raise ModelError(
            f"No {recipe.class_name} can be built from the model's scheduler_config.json and its recipe's "
            f"{json.dumps(recipe.config)} ({type(e).__name__}: {e})."
        ) from e
