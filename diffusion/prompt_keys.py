"""Keys and values of a prompt, once for an image: a stock UNet's blocks make each of theirs anew in every step.

They are a function of the prompt and the weights alone. Blocks get theirs where they got the prompt, so what computes
attention, and what compilers and graphs see of it, stays stock's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from diffusion.fused import Joined, is_plain

# Where a UNet keeps its own; no module, so its weights are in no state dict twice.
_PLACE = "_keys_of_prompts"


class PromptKeys:
    """Makes the keys and values of all blocks of a UNet from a prompt, block by block, side by side.

    Args:
        joined: as one product of matrices, for which the blocks' weights become views of one tensor. Its sums may be
            taken in another order than those of each layer by itself, which come out as stock's do.
    """

    def __init__(self, attentions: list[Attention], *, joined: bool) -> None:
        self._layers: list[nn.Linear] = [
            layer for attention in attentions for layer in (attention.to_k, attention.to_v)
        ]
        self._whole = Joined(self._layers) if joined else None

    @property
    def width(self) -> int:
        """How many numbers there are for each token."""
        return sum(layer.out_features for layer in self._layers)

    def __call__(self, prompt: torch.Tensor) -> torch.Tensor:
        """Batch x tokens x features to batch x tokens x `width`."""
        if self._whole is not None:
            return self._whole(prompt)
        return torch.cat([layer(prompt) for layer in self._layers], dim=-1)


def make_keys_once(unet: Any, *, joined: bool) -> int:
    """Have a UNet take a prompt's keys and values (`prepared`) in place of the prompt; returns for how many blocks.

    Stock's callers still give it the prompt, which it makes them of in every pass, as before. A denoiser of another
    kind, or one whose blocks do more with a prompt than attend to it, stays as it is.
    """
    if isinstance(unet, UNet2DConditionModel) and _PLACE in vars(unet):
        return 0
    found = list(_blocks(unet))
    attentions = [block.attn2 for _, block in found]
    if not found or not _is_all_that_reads_prompts(unet, attentions):
        return 0
    width = sum(2 * attention.to_k.out_features for attention in attentions)
    if width == unet.config.cross_attention_dim:  # nobody could tell one from the other
        return 0
    keys = PromptKeys(attentions, joined=joined)
    begin = 0
    for row, block in found:
        end = begin + 2 * block.attn2.to_k.out_features
        row.__class__ = _Blocks
        vars(row).setdefault("columns", []).append(slice(begin, end))
        begin = end
    for attention in attentions:
        attention.to_kv = _as_it_is
        attention.set_processor(FusedAttnProcessor2_0())
    vars(unet)["process_encoder_hidden_states"] = _Preparing(keys)
    vars(unet)[_PLACE] = keys
    return len(found)


def prepared(denoiser: Any, prompt: torch.Tensor) -> torch.Tensor:
    """What `denoiser` takes for a prompt, batch x tokens x features: its keys and values, or the prompt itself."""
    keys: PromptKeys | None = vars(denoiser).get(_PLACE)
    return prompt if keys is None else keys(prompt)


class _Blocks(nn.ModuleList):
    """A row of blocks, which are called one after another, each with its own part of all keys and values."""

    columns: list[slice]

    def __iter__(self) -> Iterator[Any]:
        for block, columns in zip(super().__iter__(), self.columns, strict=True):
            yield partial(_call_with_part, block, columns)


def _call_with_part(
    block: nn.Module,
    columns: slice,
    *arguments: Any,
    encoder_hidden_states: torch.Tensor,
    **named: Any,
) -> Any:
    return block(*arguments, encoder_hidden_states=encoder_hidden_states[..., columns], **named)


class _Preparing:
    """What a UNet does first with what it is given for a prompt."""

    def __init__(self, keys: PromptKeys) -> None:
        self._keys = keys

    def __call__(
        self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: object
    ) -> torch.Tensor:
        del added_cond_kwargs
        if encoder_hidden_states.shape[-1] == self._keys.width:
            return encoder_hidden_states
        return self._keys(encoder_hidden_states)


def _as_it_is(keys_and_values: torch.Tensor) -> torch.Tensor:
    return keys_and_values


def _blocks(unet: Any) -> Iterator[tuple[Any, Any]]:
    """Each with the row it is in."""
    if not isinstance(unet, UNet2DConditionModel):
        return
    for transformer in unet.modules():
        if isinstance(transformer, Transformer2DModel) and transformer.is_input_continuous:
            for block in transformer.transformer_blocks:
                yield transformer.transformer_blocks, block


def _is_all_that_reads_prompts(unet: Any, attentions: list[Any]) -> bool:
    """Whether a prompt goes nowhere else than into these, each of which is stock's plain attention to one."""
    readers = [
        module
        for module in unet.modules()
        if isinstance(module, Attention) and module.is_cross_attention
    ]
    return (
        unet.encoder_hid_proj is None
        and unet.config.addition_embed_type in (None, "text_time")
        and {id(one) for one in readers} == {id(one) for one in attentions}
        and len({one.to_k.in_features for one in readers}) == 1
        and all(is_plain(one) and not one.norm_cross for one in readers)
        and all(type(layer) is nn.Linear for one in readers for layer in (one.to_k, one.to_v))
    )
