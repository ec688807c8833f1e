"""Embeddings of prompts that are longer than CLIP reads at once, or whose words count for more or less: compel's.

compel (https://github.com/damian0815/compel) cuts a prompt where its sentences end, has CLIP read one piece after
another, and moves what has a weight away from what an empty prompt gives, or towards the prompt without it. This
module hands it fragments and puts together what a pipeline's `__call__` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusion.denoising import Embeddings
from diffusion.families import Architecture
from diffusion.weighting import Fragment

if TYPE_CHECKING:
    from compel.embeddings_provider import EmbeddingsProvider

# Each is one more run of every text encoder, and as many more tokens to attend to in every step. 600 tokens are some
# 400 words. Where sentences end early in a piece, they take up to twice as many.
MAX_PIECES = 8


def most_tokens(tokenizer: Any) -> int:
    """How many tokens of a prompt are read; of those that a tokenizer gives it, two say where it begins and ends."""
    return MAX_PIECES * (int(tokenizer.model_max_length) - 2)


def shortened(tokenizer: Any, fragments: tuple[Fragment, ...]) -> tuple[tuple[Fragment, ...], int]:
    """The fragments as far as they are read, and how many tokens of them are not."""
    left = most_tokens(tokenizer)
    read: list[Fragment] = []
    dropped = 0
    texts = [fragment.text for fragment in fragments]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for fragment, offsets in zip(fragments, encoded["offset_mapping"], strict=True):
        count = len(offsets)
        if count <= left:
            read.append(fragment)
        elif left:
            read.append(Fragment(fragment.text[: offsets[left - 1][1]], fragment.weight))
        dropped += max(0, count - left)
        left = max(0, left - count)
    return tuple(read), dropped


def encode_long(
    pipeline: Any,
    architecture: Architecture,
    prompt: tuple[Fragment, ...],
    negative_prompt: tuple[Fragment, ...] | None,
    *,
    guided: bool,
    device: torch.device,
) -> Embeddings:
    """What `encode_prompt` returns, by the same names: for the whole prompt, both prompts' of one length.

    Without guidance what only it needs is None. With it, where there is nothing to avoid, that is zeros or an empty
    prompt's, as the pipeline itself has it.
    """
    providers = _providers(pipeline, architecture, device)
    zeros = guided and negative_prompt is None and _zeros_for_nothing(pipeline)
    asked = [prompt]
    if guided and not zeros:
        asked.append(negative_prompt or (Fragment(""),))

    by_encoder = [
        [_hidden_states(provider, text, device) for text in asked] for provider in providers
    ]
    length = max(states.shape[1] for found in by_encoder for states in found)
    # The dtype that stock gives them: its last text encoder's.
    dtype = providers[-1].text_encoder.dtype
    states = [
        torch.cat(
            [
                _padded(found[place], length, provider)
                for found, provider in zip(by_encoder, providers, strict=True)
            ],
            dim=-1,
        ).to(device, dtype)
        for place in range(len(asked))
    ]
    embeddings = {"prompt_embeds": _with_negative(states, zeros)}
    if "pooled_prompt_embeds" in architecture.embeddings:
        # One vector for the whole image: of the last encoder, which reads of it what it reads of any prompt.
        texts = [" ".join(fragment.text for fragment in text) for text in asked]
        pooled = [providers[-1].get_pooled_embeddings([text], device=device) for text in texts]
        embeddings["pooled_prompt_embeds"] = _with_negative(pooled, zeros)
    return {
        name: tensor
        for positive, pair in embeddings.items()
        for name, tensor in zip((positive, f"negative_{positive}"), pair, strict=True)
    }


def _providers(
    pipeline: Any, architecture: Architecture, device: torch.device
) -> list[EmbeddingsProvider]:
    # 0.13 s, which a cold start need not spend.
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    states = {
        "last": ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
        "penultimate": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    }
    return [
        EmbeddingsProvider(
            getattr(pipeline, name),
            getattr(pipeline, tokenizer.encoder),
            truncate=False,
            returned_embeddings_type=states[architecture.attends_to or "last"],
            split_long_text_mode=SplitLongTextMode.SENTENCES,
            device=device,
        )
        for name, tokenizer in architecture.tokenizers.items()
    ]


def _zeros_for_nothing(pipeline: Any) -> bool:
    return bool(pipeline.config.get("force_zeros_for_empty_prompt", False))


def _hidden_states(
    provider: EmbeddingsProvider, fragments: tuple[Fragment, ...], device: torch.device
) -> torch.Tensor:
    """Of shape (1, tokens, width), where the tokens are those of whole pieces."""
    texts = [fragment.text for fragment in fragments]
    weights = [fragment.weight for fragment in fragments]
    if min(weights) < 1:
        lowered: torch.Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
            [texts], [weights], device=device
        )
        return lowered
    # The same, short of looking for each fragment's tokens among those of the pieces, which can fail. And without a
    # mask, so that a piece that has no weights in it is to the bit what stock makes of it.
    tokens, per_token, _ = provider.get_token_ids_and_expand_weights(texts, weights, device=device)
    states: torch.Tensor = provider.build_weighted_embedding_tensor(
        tokens, per_token, device=device
    )
    return states


def _padded(states: torch.Tensor, length: int, provider: EmbeddingsProvider) -> torch.Tensor:
    """Followed by as many empty pieces as it lacks."""
    while states.shape[1] < length:
        states = torch.cat([states, provider.empty_z.to(states)], dim=1)
    return states


def _with_negative(
    tensors: list[torch.Tensor], zeros: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    positive, *negative = tensors
    if zeros:
        return positive, torch.zeros_like(positive)
    return positive, negative[0] if negative else None
