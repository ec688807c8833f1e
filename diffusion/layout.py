"""Channels side by side: how convolutions on tensor cores want images to lie, through the whole of a module."""

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


def lay_channels_side_by_side(module: nn.Module) -> None:
    """Weights, and what lies between layers; otherwise every convolution would turn its input."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        if type(part) is Transformer2DModel and part.is_input_continuous:
            part.__class__ = SideBySideTransformer


class SideBySideTransformer(Transformer2DModel):  # type: ignore[misc]
    """A UNet's attention without the copy into the other layout that it ends with; the values are the same."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            image = self.proj_out(image)
        return image + residual
