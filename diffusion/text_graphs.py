"""Text encoders as CUDA graphs: some 500 launches for a prompt, which a card does faster than a host can ask for them.

Stock pipelines pad every prompt to the same length, so that each encoder needs one graph, recorded at its first prompt
while no compiled code is loaded.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from diffusion.graphs import Graphs

# Of one encoder: a length of its own for every way of asking. More would mean that prompts are not padded.
MOST_GRAPHS = 4


class TextGraphs:
    """Of the text encoders that `cover` names. The device's thread alone calls those."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._covered: list[tuple[nn.Module, Graphs]] = []

    def cover(self, encoders: Sequence[nn.Module]) -> None:
        """Have these replay their passes for one prompt from now on, and no others.

        Their weights may change where they lie. One that does not lie on the card is left as it is.
        """
        on_card = [
            encoder
            for encoder in encoders
            if all(parameter.device.type == "cuda" for parameter in encoder.parameters())
        ]
        known = {id(encoder): graphs for encoder, graphs in self._covered}
        for encoder, graphs in self._covered:
            if not any(encoder is one for one in on_card):
                encoder.__dict__.pop("forward", None)
                graphs.forget()
        self._covered = [
            # By whether it is there: graphs of which none is recorded yet are as false as none.
            (one, known[id(one)] if id(one) in known else self._stand_before(one))
            for one in on_card
        ]

    def forget(self) -> None:
        """Let go of all graphs; they are recorded again when they are wanted."""
        for _, graphs in self._covered:
            graphs.forget()

    def _stand_before(self, encoder: nn.Module) -> Graphs:
        graphs = Graphs(self._device, of="a prompt")
        # Weakly: a module that holds itself stays on the card until somebody looks for such circles.
        encoder.__dict__["forward"] = _Replaying(weakref.WeakMethod(encoder.forward), graphs)
        return graphs


class _Replaying:
    """Stands before an encoder's `forward`."""

    def __init__(self, forward: Callable[[], Callable[..., Any] | None], graphs: Graphs) -> None:
        self._forward = forward
        self._graphs = graphs

    def __call__(self, input_ids: torch.Tensor | None = None, *others: Any, **named: Any) -> Any:
        forward = self._forward()
        assert forward is not None, "a module outlives its own call"  # noqa: S101
        if (
            input_ids is None
            or input_ids.device.type != "cuda"
            or len(input_ids) != 1
            or any(isinstance(value, torch.Tensor) for value in (*others, *named.values()))
        ):
            return forward(input_ids, *others, **named)

        def encode(batch: Any) -> Any:
            return forward(batch["input_ids"], *others, **named)

        kind = (others, tuple(sorted(named.items())))
        batch = {"input_ids": input_ids}
        if len(self._graphs) == MOST_GRAPHS:
            return self._graphs.run(self, encode, batch, kind)
        # A request waits for this; the next prompt's will do as well.
        with self._graphs.recording(waits=False):
            return self._graphs.run(self, encode, batch, kind)
