"""Text encoders as CUDA graphs: some 500 launches for a prompt, which a card does faster than a host can ask for them.

Stock pipelines pad every prompt to the same length, so that each encoder needs one graph, recorded at its first prompt.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffusion.graphs import Graphs

# Of one encoder: a length of its own for every way of asking. More would mean that prompts are not padded.
MOST_GRAPHS = 4


def replay_prompts(encoder: nn.Module, device: torch.device) -> None:
    """Have the encoder's pass for one prompt replayed from its graph from now on, once there is one.

    Its weights may change where they lie. It has to stay on the card: one that lies elsewhere is left as it is.
    """
    stays = all(parameter.device.type == "cuda" for parameter in encoder.parameters())
    if stays and "forward" not in encoder.__dict__:
        encoder.__dict__["forward"] = _Replaying(encoder.forward, device)


class _Replaying:
    """Stands before an encoder's `forward`. One thread calls it."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self._forward = forward
        self._graphs = Graphs(device, of="a prompt")

    def __call__(self, input_ids: torch.Tensor | None = None, *others: Any, **named: Any) -> Any:
        if (
            input_ids is None
            or input_ids.device.type != "cuda"
            or len(input_ids) != 1
            or any(isinstance(value, torch.Tensor) for value in (*others, *named.values()))
        ):
            return self._forward(input_ids, *others, **named)

        def encode(batch: Any) -> Any:
            return self._forward(batch["input_ids"], *others, **named)

        kind = (others, tuple(sorted(named.items())))
        batch = {"input_ids": input_ids}
        if len(self._graphs) == MOST_GRAPHS:
            return self._graphs.run(self, encode, batch, kind)
        with self._graphs.recording():
            return self._graphs.run(self, encode, batch, kind)
