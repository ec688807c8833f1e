"""Prompts to embeddings: stock diffusers' for what its text encoders read at once, compel's for the rest, kept.

Whoever asks for many images of one prompt, at once or one after another, has it encoded once. `weighting.py` reads the
notation, and `long_prompts.py` runs compel.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion.denoising import Embeddings, is_guided
from diffusion.device import ran_out_of_memory
from diffusion.errors import RequestError
from diffusion.families import Architecture
from diffusion.fitting import visiting
from diffusion.long_prompts import encode_long, most_tokens, shortened
from diffusion.plain_prompts import encode_plain
from diffusion.recipe import SDXL
from diffusion.request import Plan
from diffusion.weighting import Fragment, read_weights

logger = logging.getLogger(__name__)

# 100 prompts of SDXL with guidance, which are 0.6 MB each in half precision.
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Key:
    """All that the embeddings depend on, beside the model."""

    prompt: str
    negative_prompt: str | None
    guided: bool
    weighting: bool


@dataclass(frozen=True)
class _Entry:
    embeddings: Embeddings
    warnings: tuple[str, ...]  # what whoever asks has to know of each prompt

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.embeddings.values() if tensor is not None)


class Prompts:
    """Encodes prompts with the text encoders of one model, and keeps the embeddings asked for last. For one thread.

    With other weights in the pipeline there has to be another of these. What it returns is shared: read it, and never
    write to it.

    Args:
        device: where the embeddings are wanted.
        max_bytes: how many bytes of them are kept.
    """

    def __init__(
        self,
        pipeline: Any,
        architecture: Architecture,
        device: torch.device,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._pipeline = pipeline
        self._architecture = architecture
        self._device = device
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._bytes = 0

    @property
    def _text_encoders(self) -> list[Any]:
        named = [tokenizer.encoder for tokenizer in self._architecture.tokenizers.values()]
        found = [getattr(self._pipeline, name) for name in named]
        return [encoder for encoder in found if encoder is not None]

    @property
    def kept_bytes(self) -> int:
        return self._bytes

    def encode(self, plan: Plan) -> Embeddings:
        """What the text encoders make of the plan's prompts, by the names that the pipeline's `__call__` takes.

        Of batch 1; what guidance needs is None without it. What nobody reads of a prompt is said in the log, at every
        call. Raises `RequestError` for what `read_weights` refuses and what compel fails at.
        """
        guided = is_guided(getattr(self._pipeline, self._architecture.denoiser), plan)
        negative_prompt = plan.negative_prompt if guided else None
        key = _Key(plan.prompt, negative_prompt, guided, plan.prompt_weighting)
        entry = self._entries.get(key)
        if entry is None:
            with visiting(self._text_encoders, self._device):
                entry = self._encoded(key)
            self._keep(key, entry)
        else:
            self._entries.move_to_end(key)
        for warning in entry.warnings:
            logger.warning("%s", warning)
        return entry.embeddings

    def _keep(self, key: _Key, entry: _Entry) -> None:
        if entry.size > self._max_bytes:
            return
        self._entries[key] = entry
        self._bytes += entry.size
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.size

    def _encoded(self, key: _Key) -> _Entry:
        texts = {"prompt": key.prompt}
        if key.negative_prompt is not None:
            texts["negative_prompt"] = key.negative_prompt
        tokenizers = [getattr(self._pipeline, name) for name in self._architecture.tokenizers]
        # What only the shorter of them drop, the longest still sees.
        longest = max(filter(None, tokenizers), key=lambda found: int(found.model_max_length))
        if self._architecture.attends_to is None:
            warnings = [_dropped_by_stock(name, text, longest) for name, text in texts.items()]
            return _Entry(self._stock(texts, key.guided), _said(warnings))
        fragments = {
            name: read_weights(name, text) if key.weighting else (Fragment(text),)
            for name, text in texts.items()
        }
        if all(_is_stocks(found, tokenizers) for found in fragments.values()):
            plain = {name: found[0].text for name, found in fragments.items()}
            return _Entry(self._plain(plain, key.guided), ())
        return self._long(fragments, key.guided, longest)

    def _plain(self, texts: Mapping[str, str], guided: bool) -> Embeddings:
        """The same as stock's, where that can be had sooner."""
        if guided or self._architecture.pipeline != SDXL.pipeline:
            return self._stock(texts, guided)
        return encode_plain(self._pipeline, self._architecture, texts["prompt"], self._device)

    def _stock(self, texts: Mapping[str, str], guided: bool) -> Embeddings:
        encoded = self._pipeline.encode_prompt(
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative_prompt"),
            **dict.fromkeys(self._architecture.further_prompts),
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        return dict(zip(self._architecture.embeddings, encoded, strict=True))

    def _long(
        self, fragments: Mapping[str, tuple[Fragment, ...]], guided: bool, tokenizer: Any
    ) -> _Entry:
        most = most_tokens(tokenizer)
        read, warnings = {}, []
        for name, found in fragments.items():
            read[name], dropped = shortened(tokenizer, found)
            warnings.append(_dropped(name, dropped, most, f"only {most} are read of any"))
        try:
            embeddings = encode_long(
                self._pipeline,
                self._architecture,
                read["prompt"],
                read.get("negative_prompt"),
                guided=guided,
                device=self._device,
            )
        except Exception as error:
            # What the device did not do is none of compel's.
            if isinstance(error, torch.AcceleratorError) or (
                isinstance(error, RuntimeError) and ran_out_of_memory(error)
            ):
                raise
            logger.exception("compel failed at a prompt")
            raise RequestError(
                f"The {' and '.join(read)} could not be encoded in pieces or with weights ({type(error).__name__}: "
                f"{error}). Write less than {tokenizer.model_max_length} tokens, about 50 words, without weights."
            ) from error
        return _Entry(embeddings, _said(warnings))


def _is_stocks(fragments: tuple[Fragment, ...], tokenizers: list[Any]) -> bool:
    """Whether every text encoder reads it at once, and every word counts the same."""
    if len(fragments) > 1 or fragments[0].weight != 1:
        return False
    text = fragments[0].text
    return all(len(found(text).input_ids) <= found.model_max_length for found in tokenizers)


def _dropped_by_stock(name: str, text: str, tokenizer: Any) -> str | None:
    read = int(tokenizer.model_max_length)
    dropped = max(0, len(tokenizer(text).input_ids) - read)
    return _dropped(name, dropped, read, f"the text encoder reads only {read}")


def _dropped(name: str, tokens: int, read: int, reason: str) -> str | None:
    if not tokens:
        return None
    return f"The {name} is {read + tokens} tokens long: the last {tokens} were dropped, since {reason}."


def _said(warnings: list[str | None]) -> tuple[str, ...]:
    return tuple(warning for warning in warnings if warning is not None)
