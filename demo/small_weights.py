"""Draws the small model's weights, so that an untrained network still paints something worth looking at.

Three things do it. Every layer keeps its signal near unit size, so half precision is safe. Every convolution is a
blur, so the picture is made of shapes rather than of grain. And the UNet carries its input past its layers to its
output, so it predicts mostly the noise it was given, minus a smooth picture that follows the prompt.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

Shapes = Mapping[str, torch.Size]
# Uniform numbers from 0 to 1 of a shape, as float32, from the stream that belongs to the given key.
Numbers = Callable[[bytes, Sequence[int]], torch.Tensor]
Uniform = Callable[[str, Sequence[int], float], torch.Tensor]

_BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
_LATENTS = 4


def portable_numbers(key: bytes, shape: Sequence[int]) -> torch.Tensor:
    """From numpy, because that is integer arithmetic and one multiplication: bit-equal on every machine."""
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))
    return torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))


def draw_text_encoder(
    shapes: Shapes, seed: int, component: str, numbers: Numbers = portable_numbers
) -> dict[str, torch.Tensor]:
    """Weights of a CLIP text encoder in which every token weighs in."""
    return _drawn(shapes, seed, component, numbers)


def draw_unet(
    shapes: Shapes, seed: int, groups: int, numbers: Numbers = portable_numbers
) -> dict[str, torch.Tensor]:
    """Weights of a UNet whose output is its (normalised) input minus a smooth picture."""
    tensors = _drawn(shapes, seed, "unet", numbers)
    for name, tensor in tensors.items():
        if name.endswith("time_emb_proj.weight"):
            tensor *= 2.0  # where the pooled prompt and the time come in: loud enough to be seen
        elif ".attn2.to_out." in name and name.endswith("weight"):
            tensor *= 2.0
    _pass_input_through(tensors, groups)
    return tensors


def draw_vae(
    shapes: Shapes, seed: int, scaling_factor: float, numbers: Numbers = portable_numbers
) -> dict[str, torch.Tensor]:
    """Weights of a VAE whose decoder turns latents of unit size into a full range of colours."""
    tensors = _drawn(shapes, seed, "vae", numbers)
    tensors["post_quant_conv.weight"] = scaling_factor * torch.eye(_LATENTS)[:, :, None, None]
    tensors["post_quant_conv.bias"].zero_()
    tensors["decoder.conv_out.weight"] *= 0.9
    tensors["decoder.conv_out.bias"].zero_()
    return tensors


def _pass_input_through(tensors: dict[str, torch.Tensor], groups: int) -> None:
    """Give the UNet's first and last layers a path that carries the latents unchanged.

    silu(x) - silu(-x) = x, so each latent channel travels twice, once negated, through the last norm and activation.
    Side by side in one norm group the two have mean zero, so that the norm only scales them.
    """
    conv_in, conv_out = tensors["conv_in.weight"], tensors["conv_out.weight"]
    channels = conv_in.shape[0]
    copies = max(1, channels // groups // 4)  # a wide model has wider norm groups: fill two of them
    carried = 2 * _LATENTS * copies
    # The last one, which conv_in's own output skips to.
    resnet = max(
        name.removesuffix(".conv_shortcut.weight")
        for name in tensors
        if name.startswith("up_blocks.2.resnets.") and name.endswith(".conv_shortcut.weight")
    )
    shortcut = tensors[f"{resnet}.conv_shortcut.weight"]
    skipped = (
        shortcut.shape[1] - channels
    )  # what skips to it is concatenated after what was computed
    silent = ("conv_in.bias", f"{resnet}.conv2.weight", f"{resnet}.conv2.bias")

    # What is left of conv_out paints the picture; its size decides how much of it four steps build up.
    conv_out *= -0.3
    conv_out[:, :carried] = 0.0
    tensors["conv_out.bias"].zero_()
    conv_in[:carried] = 0.0
    shortcut[:carried] = 0.0
    for name in (*silent, f"{resnet}.conv_shortcut.bias"):
        tensors[name][:carried] = 0.0
    for channel in range(carried):
        latent, sign = channel // 2 % _LATENTS, 1.0 - 2.0 * (channel % 2)
        conv_in[channel, latent, 1, 1] = sign
        shortcut[channel, skipped + channel] = 1.0
        conv_out[latent, channel, 1, 1] = sign / copies


def _drawn(shapes: Shapes, seed: int, component: str, numbers: Numbers) -> dict[str, torch.Tensor]:
    def uniform(name: str, shape: Sequence[int], deviation: float) -> torch.Tensor:
        """Uniform, of this standard deviation, from the tensor's own stream: no order, no thread count matters."""
        key = hashlib.sha256(f"{seed}/{component}/{name}".encode()).digest()
        return (numbers(key, shape) - 0.5) * (2 * math.sqrt(3) * deviation)

    return {name: _draw(name, shape, uniform) for name, shape in shapes.items()}


def _draw(name: str, shape: torch.Size, uniform: Uniform) -> torch.Tensor:
    if name.endswith("norm.weight") or _is_norm(name):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias"):
        return uniform(name, shape, 0.1)
    if "embedding.weight" in name:
        size = 1.0 if "token" in name else 0.3
        return uniform(name, shape, size)
    if len(shape) == 4 and shape[-1] == 3:
        mix = uniform(name, shape[:2], 1 / math.sqrt(shape[1]))
        return (
            mix[:, :, None, None] * _BLUR.to(mix.device) * 1.5
        )  # 1.5: what a blur takes from a signal that is not all smooth
    fan_in = math.prod(shape[1:])
    return uniform(name, shape, 1 / math.sqrt(fan_in))


def _is_norm(name: str) -> bool:
    module = name.rsplit(".", 2)[-2]
    return module.startswith(("norm", "layer_norm", "group_norm", "conv_norm", "final_layer_norm"))
