"""Compiled regions: what `regions.py` names of a denoiser and of a card's VAE, as torch.compile makes it.

Only shapes that were learned on purpose run compiled, and everything else as it would without: no request sets a
compiler off, and whatever fails leaves the plain path. Whoever has shapes learned sees to it that no request waits
meanwhile. What was compiled can be taken to another machine of the same
kind as bytes (`save_artifacts`, `load_artifacts`). Those bytes are code; whom to trust with that is the caller's
business.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import re
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from diffusion.device import ran_out_of_memory
from diffusion.errors import CompileError
from diffusion.regions import Note, Region, decoder_regions, denoiser_regions
from diffusion.rehearsal import MOST_GRAPHS, Rehearsal

logger = logging.getLogger(__name__)

Way = Callable[[Region], None]


_TORCHS_OWN = "torch"  # in the archive: what `torch.compiler` saved
_LIBRARIES = (
    "libraries"  # in the archive: what C++ and Triton's C became, which torch does not save
)
_LIBRARY_SUFFIX = ".so"


@dataclass(frozen=True)
class Compiling:
    """What is to run compiled: width and height of the `sizes`; others run as they are.

    With `only_from_artifacts` nothing is compiled here: a region that torch's caches do not have runs as it is.
    """

    sizes: frozenset[tuple[int, int]]
    only_from_artifacts: bool


@dataclass(frozen=True)
class Tally:
    """Graphs of this process so far: compiled here, and taken from a cache."""

    made: int
    found: int


def tally() -> Tally:
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    return Tally(
        inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        inductor["fxgraph_cache_hit"],
    )


@dataclass
class Lesson:
    """What comes of `learning`: whether all that ran inside runs compiled from now on."""

    learned: bool = True


class CompiledRegions:
    """The regions of the denoiser and the VAE that `cover` names. They run as they are until a shape is learned.

    One thread uses the parts. Raises `CompileError` when this torch has no compiler at all.
    """

    def __init__(self, *, only_from_artifacts: bool) -> None:
        self._how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._parts: list[_Part] = []
        try:
            if only_from_artifacts:
                self._how["backend"] = _from_caches_only()
        except (ImportError, RuntimeError) as error:
            raise CompileError(f"nothing can be compiled here: {first_line(error)}.") from error

    def cover(self, denoiser: Any, vae: Any) -> None:
        """Stand before these parts from now on. One that is covered already keeps what it has learned.

        Raises `CompileError`.
        """
        on_card = denoiser.device.type == "cuda"
        wanted = [(denoiser, "forward", denoiser_regions(denoiser, on_card=on_card))]
        # On a CPU compiling a decoder takes a minute and saves nothing: its time goes into convolutions.
        if on_card:
            wanted.append((vae, "decode", decoder_regions(vae)))
        covered = {id(part.owner): part for part in self._parts}
        try:
            self._parts = [
                covered.get(id(owner)) or _Part(owner, method, regions, self._how)
                for owner, method, regions in wanted
            ]
        except RuntimeError as error:
            raise CompileError(f"nothing can be compiled here: {first_line(error)}.") from error

    def __len__(self) -> int:
        """How many shapes were learned, over all parts."""
        return sum(len(part.learned) for part in self._parts)

    @contextmanager
    def learning(self) -> Iterator[Lesson]:
        """Inside, a pass of a shape that is not known yet is compiled, or taken from torch's caches.

        What cannot be runs as it is, and the `Lesson` says so.
        """
        lesson = Lesson()
        for part in self._parts:
            part.lesson = lesson
        try:
            yield lesson
        finally:
            for part in self._parts:
                part.lesson = None

    @contextmanager
    def observing(self) -> Iterator[Rehearsal]:
        """Inside, passes run as they are, and every kind of call is noted. Run what was noted on any thread then."""
        rehearsal = Rehearsal()
        with ExitStack() as exits:
            for part in self._parts:
                exits.enter_context(part.observing(rehearsal.note))
            yield rehearsal


class _Part:
    """Stands before `owner`'s method, and says for every call how the regions inside run."""

    def __init__(
        self, owner: nn.Module, method: str, regions: Iterable[Region], how: Mapping[str, Any]
    ) -> None:
        self.owner = owner
        self.lesson: Lesson | None = None  # while there is something to learn
        self.observed = False
        self.learned: set[object] = set()
        self._refused: set[object] = set()
        self._name = type(owner).__name__
        self._call = getattr(owner, method)
        self.regions = list(regions)
        for region in self.regions:
            region.compile(how)
        self._way: Way | None = None
        setattr(owner, method, self._gate)

    def _gate(self, *arguments: Any, **named: Any) -> Any:
        if self.observed:
            return self._call(*arguments, **named)
        shapes = _shapes((arguments, named))
        if shapes in self.learned:
            self._run(Region.run_known)
            return self._call(*arguments, **named)
        if self.lesson is None or shapes in self._refused:
            if self.lesson is not None:
                self.lesson.learned = False
            self._run(Region.run_plain)
            return self._call(*arguments, **named)
        reason = ""
        try:
            from torch._dynamo import config

            self._run(Region.run_learning)
            # torch keeps its configuration by thread, so it is set where it is read.
            with config.patch(recompile_limit=MOST_GRAPHS):
                result = self._call(*arguments, **named)
        except Exception as error:
            if isinstance(error, RuntimeError) and ran_out_of_memory(error):
                raise
            reason = first_line(error)  # and no more of it: its frames hold tensors
        else:
            self.learned.add(shapes)
            return result
        if not self._refused:
            logger.warning("%s runs without compiled code, as well as ever: %s", self._name, reason)
        self._refused.add(shapes)
        self.lesson.learned = False
        self._run(Region.run_plain)
        return self._call(*arguments, **named)

    def _run(self, way: Way) -> None:
        if way is not self._way:
            for region in self.regions:
                way(region)
            self._way = way

    @contextmanager
    def observing(self, note: Note) -> Iterator[None]:
        """Inside all calls run as they are, and `note` is told of the regions'."""
        self._run(Region.run_plain)
        with ExitStack() as exits:
            for region in self.regions:
                exits.enter_context(region.observed(note))
            self.observed = True
            try:
                yield
            finally:
                self.observed = False


def save_artifacts() -> bytes:
    """All that was compiled in this process, for `load_artifacts` on a machine with the same `artifact_key`.

    Everything in torch's cache folder goes along, so let that be a fresh one (TORCHINDUCTOR_CACHE_DIR). Raises
    `CompileError` where nothing came of compiling that could be kept.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None or not saved[1].aot_autograd_artifacts:
        raise CompileError(
            "nothing came of compiling that torch could keep. See the lines above for what kept it from compiling."
        )
    folder = _cache_folder()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
        _add(archive, _TORCHS_OWN, saved[0])
        for library in sorted(folder.rglob(f"*{_LIBRARY_SUFFIX}")):
            name = f"{_LIBRARIES}/{library.relative_to(folder).as_posix()}"
            _add(archive, name, library.read_bytes())
    return packed.getvalue()


def load_artifacts(data: bytes) -> None:
    """Put what `save_artifacts` gave into torch's caches, from where compiling takes it. This trusts it as code.

    Raises `CompileError` for anything else.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            torchs_own = b""
            for member in archive:
                content = archive.extractfile(member)
                if content is None:
                    continue
                if member.name == _TORCHS_OWN:
                    torchs_own = content.read()
                else:
                    _write_library(member.name, content.read())
        loaded = torch.compiler.load_cache_artifacts(torchs_own)
    except Exception as error:  # torch's own loading raises whatever it meets
        raise CompileError(f"the artifacts cannot be loaded: {first_line(error)}.") from error
    if loaded is None:
        raise CompileError("the artifacts cannot be loaded: torch does not know their form.")
    # A second of imports that the first pass would wait for: better here, beside the weights.
    import_module("torch._inductor.compile_fx")


def artifact_key(device: torch.device, dtype: torch.dtype, *, float8: bool = False) -> str:
    """What compiled code depends on beside the model, as a name that S3 and people can read."""
    numbers = str(dtype).removeprefix("torch.") + ("-float8" if float8 else "")
    parts = (
        *_machine(device),
        f"torch-{torch.__version__}",
        f"triton-{_installed('triton', 'pytorch-triton')}",
        f"diffusers-{_installed('diffusers')}",
        f"python-{sys.version_info.major}.{sys.version_info.minor}",
        numbers,
    )
    key = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts)
    return key[:255]


def _machine(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        yield torch.cuda.get_device_name(device)
        yield f"sm{major}{minor}"
        return
    yield _processor()
    yield torch.backends.cpu.get_cpu_capability()
    # inductor writes the number of threads into the C++ it makes.
    yield f"threads-{torch.get_num_threads()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor())[:80]}-{platform.machine()}"


def _installed(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _from_caches_only() -> Callable[..., Any]:
    """inductor, but for the compiling: what its caches do not have is refused."""
    from torch._inductor.compile_fx import compile_fx

    def refuse(*_arguments: Any, **_named: Any) -> Any:
        raise CompileError(
            "the published artifacts do not have what this machine wants. Publish them again with "
            "scripts/compile_model.py"
        )

    return partial(compile_fx, inner_compile=refuse)


def _shapes(value: Any) -> object:
    """What of a call's arguments a compiled graph depends on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _shapes(inner)) for name, inner in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(_shapes(inner) for inner in value)
    return None


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _write_library(name: str, data: bytes) -> None:
    """Into torch's cache folder, whole or not at all: other processes may be using it."""
    first, *inside = PurePosixPath(name).parts
    if first != _LIBRARIES or not inside or ".." in inside or not name.endswith(_LIBRARY_SUFFIX):
        raise CompileError(f"{name!r} has no place in an archive of compiled code")
    path = _cache_folder().joinpath(*inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    partial_path.write_bytes(data)
    partial_path.chmod(0o755)
    partial_path.replace(path)


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that dynamo adds to it."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines()
    line = lines[0] if lines else type(inner).__name__
    return line.removesuffix(".")[:300]
