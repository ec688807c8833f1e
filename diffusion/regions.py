"""What of a model is compiled: the parts that repeat, so that a compiler sees each kind of them once.

A UNet as one whole would be read for longer at every start, whatever was published: dynamo follows each of its blocks,
and of the parts below it follows one of each kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

# In denoisers whose classes do not say so (`_repeated_blocks`).
REPEATED_BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock")
# Norms and activations beside convolutions: a card reads and writes every one of them from memory if nobody fuses them.
AROUND_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D", "SubPixelUpsample")
# What a UNet does before and after a row of blocks.
AROUND_BLOCKS = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")


# A region that is told of; and the arguments it was called with.
Note = Callable[["Region", tuple[Any, ...], Mapping[str, Any]], None]


class Region(ABC):
    """A part that runs as it is, or compiled: as `compile` has it, or only what is compiled already."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain: Callable[..., Any] = self._found()
        self._compiled: Callable[..., Any] = self._plain
        # Belongs to the thread that calls it, where torch's own ways to forbid compiling are everybody's.
        self._known: Callable[..., Any] = self._plain

    @property
    def kind(self) -> object:
        """Equal for regions that the same code can be compiled for."""
        parts = (
            (name, type(part), *sorted(_simple_attributes(part)))
            for name, part in self._module.named_modules()
        )
        tensors = self._module.state_dict().items()
        return tuple(parts), tuple((name, one.shape, one.dtype) for name, one in tensors)

    def compile(self, how: Mapping[str, Any]) -> None:
        """Have it compiled whenever `run_compiled` or a pass calls it with something new."""
        self._compiled = torch.compile(self._plain, **how)
        self._known = torch._dynamo.run(self._plain)  # noqa: SLF001 - has no public name

    def run_plain(self) -> None:
        """As it is, from now on."""
        self._put(None)

    def run_known(self) -> None:
        """Compiled from now on, where it has been compiled for what it is called with, and as it is where not."""
        self._put(self._known)

    def run_learning(self) -> None:
        """Compiled from now on, whatever it is called with."""
        self._put(self._compiled)

    def run_compiled(self, *arguments: Any, **named: Any) -> Any:
        """Call it so, whichever way it runs otherwise."""
        return self._compiled(*arguments, **named)

    @contextmanager
    def observed(self, note: Note) -> Iterator[None]:
        """Inside it runs as it is, and `note` is told of every call."""

        def telling(*arguments: Any, **named: Any) -> Any:
            note(self, arguments, named)
            return self._plain(*arguments, **named)

        self._put(telling)
        try:
            yield
        finally:
            self._put(None)

    @abstractmethod
    def _found(self) -> Callable[..., Any]:
        """What runs where nothing was put in its place."""

    @abstractmethod
    def _put(self, other: Callable[..., Any] | None) -> None:
        """Have something run in its place, or itself again."""


class Block(Region):
    """A module's whole pass."""

    def _found(self) -> Callable[..., Any]:
        found: Callable[..., Any] = self._module._call_impl  # noqa: SLF001 - what torch compiles of a module
        return found

    def _put(self, other: Callable[..., Any] | None) -> None:
        self._module._compiled_call_impl = other  # noqa: SLF001 - where torch keeps it


class Method(Region):
    """One method of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name = name
        super().__init__(module)

    @property
    def kind(self) -> object:
        return self._name, super().kind

    def _found(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self._module, self._name)
        return found

    def _put(self, other: Callable[..., Any] | None) -> None:
        if other is None:
            self._module.__dict__.pop(self._name, None)
        else:
            self._module.__dict__[self._name] = other


def _simple_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What compiled code may have taken for given: 1 is another number than 1.0 there."""
    for name, value in vars(module).items():
        if value is None or isinstance(value, bool | int | float | str | tuple):
            yield name, repr(value)


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
