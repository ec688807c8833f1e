"""Compiled regions: the same pictures, only for sizes that were learned, through refreshes, and never a failure."""

import gc
import io
import re
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from demo.small_sdxl import write_small_sdxl
from diffusion.compiled import (
    Compiling,
    Lesson,
    _Part,
    artifact_key,
    load_artifacts,
    save_artifacts,
    tally,
)
from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import CompileError
from diffusion.refresh import stage
from diffusion.regions import Region
from diffusion.speed import peak_signal_to_noise
from tests.diffusion.support import LIGHTNING, build, pixels, read_configs, read_tensors

RECIPE = LIGHTNING.model_copy(update={"native_size": 64})
REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=2, seed=3)
SIZES = frozenset({(64, 64)})
CPU = torch.device("cpu")

needs_compiler = [pytest.mark.system_program("g++"), pytest.mark.slow, pytest.mark.timeout(600)]


def warmed(folder: Path, compiling: Compiling | None) -> Engine:
    engine = Engine(build(folder, RECIPE), RECIPE, "one", compiling=compiling)
    engine.warm_up()
    for done in engine.getting_ready:
        done.result(300)
    return engine


def image(engine: Engine, **changes: object) -> np.ndarray:
    return pixels(next(engine.generate(replace(REQUEST, **changes))).image)


def denoiser_part(engine: Engine) -> _Part:
    assert engine._speed._regions is not None
    (part,) = engine._speed._regions._parts
    return part


@dataclass(frozen=True)
class Made:
    """An engine that has compiled, what it left, and where."""

    engine: Engine
    artifacts: bytes
    cache: Path


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    cache = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        engine = warmed(model, Compiling(SIZES, only_from_artifacts=False))
        yield Made(engine, save_artifacts(), cache)


@pytest.fixture(scope="module")
def plain(model: Path) -> Engine:
    return Engine(build(model, RECIPE), RECIPE)


class TestCompiled:
    pytestmark = needs_compiler

    def test_images_are_near_those_without(self, made, plain):
        ours = next(made.engine.generate(REQUEST)).image

        assert peak_signal_to_noise(ours, next(plain.generate(REQUEST)).image) >= 50
        assert denoiser_part(made.engine)._way is Region.run_known
        assert tally().made >= 2  # one for each kind of block

    def test_the_same_seed_gives_the_same_image(self, made):
        generations = [made.engine.submit(replace(REQUEST, seed=seed)) for seed in (3, 4, 3)]

        first, other, again = (
            pixels(generation.images[0].result(60).image) for generation in generations
        )

        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_a_size_that_was_not_learned_runs_as_it_would_without(self, made, plain):
        before = tally()

        ours = image(made.engine, width=96)

        np.testing.assert_array_equal(ours, image(plain, width=96))
        assert tally() == before
        assert len(denoiser_part(made.engine).learned) == 1

    def test_a_size_that_does_not_compile_is_not_among_those_that_did(
        self, model, plain, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        pipeline = build(model, RECIPE)

        def break_wide_ones(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments[0].shape[1] % 3 == 0:  # the tokens of 96x64, at every depth
                torch._dynamo.graph_break()

        for module in pipeline.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.register_forward_pre_hook(break_wide_ones)
        wide = (96, 64)
        engine = Engine(
            pipeline, RECIPE, compiling=Compiling(SIZES | {wide}, only_from_artifacts=False)
        )

        engine.warm_up()

        assert engine.compiled == SIZES
        assert engine.getting_ready == ()
        np.testing.assert_array_equal(image(engine, width=96), image(plain, width=96))

    def test_a_new_version_runs_on_the_same_code(self, made, tmp_path):
        update = write_small_sdxl(tmp_path / "update", seed=1)
        cached = Compiling(SIZES, only_from_artifacts=True)
        fresh = warmed(update, cached)
        expected, before, old = image(fresh), tally(), image(made.engine)

        made.engine.replace(stage(read_configs(update), read_tensors(update), RECIPE, "two"))

        np.testing.assert_array_equal(image(made.engine), expected)
        assert not np.array_equal(expected, old)
        assert denoiser_part(made.engine)._way is Region.run_known
        assert tally() == before

    def test_what_was_compiled_comes_out_of_its_artifacts(self, made, model, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        before = tally()

        load_artifacts(made.artifacts)
        engine = warmed(model, Compiling(SIZES, only_from_artifacts=True))

        assert len(denoiser_part(engine).learned) == 1
        assert engine.compiled == SIZES
        assert tally().made == before.made
        assert {path.name for path in tmp_path.rglob("*.so")} == {
            path.name for path in made.cache.rglob("*.so")
        }

    def test_artifacts_that_do_not_fit_leave_the_plain_path_and_one_line(
        self, model, plain, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        before = tally()

        engine = warmed(model, Compiling(SIZES, only_from_artifacts=True))

        (line,) = (record.message for record in caplog.records if record.levelname == "WARNING")
        assert "UNet2DConditionModel runs without compiled code" in line
        assert "Publish them again with scripts/compile_model.py" in line
        assert tally() == before
        assert engine.compiled == frozenset()
        np.testing.assert_array_equal(image(engine), image(plain))


def archive(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"neither a tar nor anything else",
        archive(),
        archive(torch=b"what torch does not know"),
        archive(**{"../outside.so": b"x"}),
        archive(**{"libraries/../../outside.so": b"x"}),
        archive(**{"/outside.so": b"x"}),
        archive(**{"libraries/sub/outside.py": b"x"}),
    ],
    # Their bytes hold the time at which they were made, and the names of tests must be the same in two processes.
    ids=["empty", "text", "nothing", "torch", "up", "inner up", "absolute", "elsewhere"],
)
def test_what_is_no_archive_of_compiled_code_is_refused(data, tmp_path, monkeypatch):
    cache = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))

    with pytest.raises(CompileError, match="cannot be loaded"):
        load_artifacts(data)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_key_is_a_name_that_tells_machine_and_versions():
    key = artifact_key(CPU, torch.float32)

    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{20,254}", key)
    assert f"torch-{torch.__version__.replace('+', '-')}_" in key
    assert "_diffusers-" in key
    assert f"_threads-{torch.get_num_threads()}_" in key
    assert key.endswith("_float32")


def test_the_key_differs_where_compiled_code_would(monkeypatch):
    keys = [
        artifact_key(CPU, torch.float32),
        artifact_key(CPU, torch.bfloat16),
        artifact_key(CPU, torch.bfloat16, float8=True),
    ]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(artifact_key(CPU, torch.float32))

    assert len(set(keys)) == 4


def test_sizes_that_got_ready_are_not_kept_nor_what_kept_one_from_it(model):
    class BrokenError(RuntimeError):
        pass

    failures: list[weakref.ref[BrokenError]] = []
    wide = (96, 64)

    def break_wide_ones(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[-1] == wide[0] // 8:
            error = BrokenError("too wide")
            failures.append(weakref.ref(error))
            raise error

    pipeline = build(model, RECIPE)
    pipeline.unet.register_forward_pre_hook(break_wide_ones)
    compiling = Compiling(frozenset({wide, (64, 96)}), only_from_artifacts=True)
    engine = Engine(pipeline, RECIPE, compiling=compiling)

    engine.warm_up()
    engine._loop.when_idle(lambda: None).result(60)  # after all that was left for later
    gc.collect()

    assert engine.getting_ready == ()
    assert len(failures) == 1
    assert failures[0]() is None


class _Owner(nn.Module):
    """A denoiser of which a test decides how its next calls end."""

    def __init__(self, *endings: Exception) -> None:
        super().__init__()
        self.endings = list(endings)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if self.endings:
            raise self.endings.pop(0)
        return sample + 1


def test_a_pass_that_cannot_be_compiled_runs_plainly_and_is_not_tried_again(caplog):
    owner = _Owner(RuntimeError("no compiler\nand pages of detail"))
    part = _Part(owner, "forward", [], {})
    part.lesson = lesson = Lesson()

    results = [owner(torch.zeros(2)) for _ in range(2)]

    assert all(torch.equal(result, torch.ones(2)) for result in results)
    assert part.learned == set()
    assert not lesson.learned
    (line,) = caplog.messages
    assert line.endswith("without compiled code, as well as ever: no compiler")


def test_running_out_of_memory_is_no_reason_to_give_compiled_code_up():
    owner = _Owner(torch.OutOfMemoryError("the card is full"))
    part = _Part(owner, "forward", [], {})
    part.lesson = Lesson()

    with pytest.raises(torch.OutOfMemoryError):
        owner(torch.zeros(2))

    assert torch.equal(owner(torch.zeros(2)), torch.ones(2))
    assert len(part.learned) == 1


def test_shapes_and_dtypes_tell_passes_apart_wherever_they_stand():
    part = _Part(_Owner(), "forward", [], {})
    part.lesson = lesson = Lesson()
    calls = [torch.zeros(2), torch.ones(2), torch.zeros(3), torch.zeros(2, dtype=torch.float16)]

    for sample in calls:
        part.owner(sample=sample)

    assert len(part.learned) == 3
    assert lesson.learned


def test_a_pass_that_was_refused_once_is_still_not_learned_the_next_time():
    owner = _Owner(RuntimeError("no compiler"))
    part = _Part(owner, "forward", [], {})
    part.lesson = Lesson()
    owner(torch.zeros(2))

    part.lesson = again = Lesson()
    owner(torch.zeros(2))

    assert not again.learned
