"""Stock parts run by OpenVINO: traced once for every shape, and called with the same arguments as before.

`torch.compile(backend="openvino")` would be the short way; with torch 2.13 its guards fail (OpenVINO 2026.4.1).
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import openvino
import torch
from torch import nn

# The denoiser's arguments by position, so that tracing has tensors alone to look at.
Tensors = tuple[torch.Tensor, ...]


class _Denoiser(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        sample, timestep, prompt, pooled, time_ids = tensors
        added = {"text_embeds": pooled, "time_ids": time_ids}
        # The class's own: the instance's is what this stands in for.
        prediction: torch.Tensor = type(self.unet).forward(
            self.unet, sample, timestep, prompt, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = type(self.vae).decode(self.vae, latents, return_dict=False)[0]
        return pixels


class _Compiled:
    """A module as OpenVINO models, one for each shape it is called with."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._models: dict[tuple[torch.Size, ...], Any] = {}

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._models:
            self._models[shapes] = self._compile(tensors)
        (found,) = self._models[shapes]([tensor.numpy() for tensor in tensors]).values()
        return torch.from_numpy(found)

    def _compile(self, tensors: Tensors) -> Any:
        logging.getLogger("nncf").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: shapes are constants, and meant to be
            model = openvino.convert_model(
                self._module,
                example_input=tensors,
                input=[list(tensor.shape) for tensor in tensors],
            )
        # Or a processor that has bfloat16 would compute in it.
        return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def replace_parts(pipeline: Any) -> None:
    """Have OpenVINO run the pipeline's UNet and its VAE's decoder."""
    denoiser = _Compiled(_Denoiser(pipeline.unet))
    decoder = _Compiled(_Decoder(pipeline.vae))

    def forward(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
        **_rest: Any,
    ) -> Tensors:
        added = (added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        return (denoiser(sample, timestep, encoder_hidden_states, *added),)

    def decode(latents: torch.Tensor, **_rest: Any) -> Tensors:
        return (decoder(latents),)

    pipeline.unet.forward = forward
    pipeline.vae.decode = decode
