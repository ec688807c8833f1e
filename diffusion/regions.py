"""What of a model is compiled: the parts that repeat, so that a compiler sees each kind of them once.

A UNet as one whole would be a tenth faster to run at most, and dynamo alone would take half a minute to read it at
every start, whatever was published.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

# In denoisers whose classes do not say so (`_repeated_blocks`).
REPEATED_BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock")
# Norms and activations beside convolutions: a card reads and writes every one of them from memory if nobody fuses them.
AROUND_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
# What a UNet does before and after a row of blocks.
AROUND_BLOCKS = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")


class Region(Protocol):
    """A part that runs compiled or as it is."""

    @property
    def kind(self) -> object:
        """Equal for regions that the same code can be compiled for."""

    def compile(self, how: Mapping[str, Any]) -> None:
        """Have it compiled whenever it is called next, as it is from then on."""

    def switch(self, *, compiled: bool) -> None:
        """Which of the two runs from now on."""

    def run_compiled(self, *arguments: Any, **named: Any) -> Any:
        """Call it so, whichever it is switched to."""

    def observed(self, note: "Note") -> AbstractContextManager[None]:
        """Inside, tell `note` of every call that runs as it is."""


Note = Callable[[Region, tuple[Any, ...], Mapping[str, Any]], None]


class Block:
    """A module's whole pass."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Any = None

    @property
    def kind(self) -> object:
        return _kind(self._module)

    def compile(self, how: Mapping[str, Any]) -> None:
        self._module.compile(**how)
        self._compiled = self._module._compiled_call_impl  # noqa: SLF001 - where torch keeps it

    def switch(self, *, compiled: bool) -> None:
        # Cheaper than torch's own stance "force_eager", which costs some 100 us a region and call.
        self._module._compiled_call_impl = self._compiled if compiled else None  # noqa: SLF001

    def run_compiled(self, *arguments: Any, **named: Any) -> Any:
        return self._compiled(*arguments, **named)

    @contextmanager
    def observed(self, note: Note) -> Iterator[None]:
        def tell(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            note(self, arguments, named)

        hook = self._module.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


class Method:
    """One method of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._plain = getattr(module, name)
        self._compiled: Any = None

    @property
    def kind(self) -> object:
        return self._name, _kind(self._module)

    def compile(self, how: Mapping[str, Any]) -> None:
        self._compiled = torch.compile(self._plain, **how)

    def switch(self, *, compiled: bool) -> None:
        self._module.__dict__[self._name] = self._compiled if compiled else self._plain

    def run_compiled(self, *arguments: Any, **named: Any) -> Any:
        return self._compiled(*arguments, **named)

    @contextmanager
    def observed(self, note: Note) -> Iterator[None]:
        before = self._module.__dict__[self._name]

        def telling(*arguments: Any, **named: Any) -> Any:
            note(self, arguments, named)
            return before(*arguments, **named)

        self._module.__dict__[self._name] = telling
        try:
            yield
        finally:
            self._module.__dict__[self._name] = before


def _kind(module: nn.Module) -> object:
    parameters = module.named_parameters()
    return type(module), tuple((name, one.shape, one.dtype) for name, one in parameters)


def denoiser_regions(denoiser: nn.Module, *, on_card: bool) -> Iterator[Region]:
    """On a CPU, where time goes into products of matrices, only the blocks that do most of them."""
    names = tuple(getattr(denoiser, "_repeated_blocks", None) or REPEATED_BLOCKS)
    if on_card:
        names += AROUND_CONVOLUTIONS
    for module in denoiser.modules():
        if type(module).__name__ in names:
            yield Block(module)
        if on_card and isinstance(module, Transformer2DModel) and module.is_input_continuous:
            yield from (Method(module, name) for name in AROUND_BLOCKS)


def decoder_regions(vae: Any) -> Iterator[Region]:
    """The decoder, whose blocks hardly repeat."""
    yield Block(vae.decoder)
