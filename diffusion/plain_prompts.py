"""Plain prompts for SDXL without guidance, as stock's `encode_prompt` encodes them, with less done around it.

Stock looks through all modules of both encoders for where they are, and tokenizes each prompt twice: on 2 cores that
takes the host 2 ms of an image, in which a card has nothing to do.
"""

from typing import Any

import torch

from diffusion.families import Architecture


def encode_plain(
    pipeline: Any, architecture: Architecture, text: str, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """What both encoders make of a text that each of them reads at once, by the names that `__call__` takes."""
    hidden: list[torch.Tensor] = []
    pooled: torch.Tensor | None = None
    for name, kind in architecture.tokenizers.items():
        tokenizer, encoder = getattr(pipeline, name), getattr(pipeline, kind.encoder)
        tokens = tokenizer(
            pipeline.maybe_convert_prompt(text, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        encoded = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        hidden.append(encoded.hidden_states[-2])
        pooled = encoded[0]  # only the last encoder's is asked for
    assert pooled is not None  # noqa: S101 - there are two of them
    embeddings = dict.fromkeys(architecture.embeddings)
    dtype = pipeline.text_encoder_2.dtype
    return embeddings | {
        "prompt_embeds": torch.concat(hidden, dim=-1).to(device, dtype),
        "pooled_prompt_embeds": pooled.to(device, dtype),
    }
