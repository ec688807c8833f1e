"""Images in company: bit for bit those that each seed gives alone, whoever comes, fails or leaves."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from threading import Event

import numpy as np
import pytest
import torch

from diffusion.company import Company
from diffusion.engine import Engine, Generation, GenerationRequest
from diffusion.errors import OutOfMemoryError
from diffusion.recipe import Recipe
from tests.diffusion.support import GUIDED, LIGHTNING, build, pixels

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, seed=3)
WAIT = 120


class Passes:
    """Counts the rows of every pass of the denoiser; can hold the first, so that others gather behind it."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[int] = []
        self.reached, self.go_on = Event(), Event()
        self._hook = engine._pipeline.unet.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _: object, inputs: Sequence[torch.Tensor], *__: object) -> None:
        self.rows.append(len(inputs[0]))
        self.reached.set()
        assert self.go_on.wait(WAIT)

    def remove(self) -> None:
        self.go_on.set()
        self._hook.remove()


@contextmanager
def gathered(engine: Engine, first: GenerationRequest) -> Iterator[tuple[Passes, Generation]]:
    """`first` is in its first step; whoever is submitted now waits until the passes may go on."""
    passes = Passes(engine)
    generation = engine.submit(first)
    assert passes.reached.wait(WAIT)
    try:
        yield passes, generation
    finally:
        passes.remove()


def engine_of(model, recipe: Recipe = LIGHTNING, **options) -> Engine:
    return Engine(build(model, recipe), recipe, **options)


def pictures(generation: Generation) -> list[np.ndarray]:
    return [pixels(image.result(WAIT).image) for image in generation.images]


@pytest.mark.parametrize("recipe", [LIGHTNING, GUIDED])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (256, 256)])
def test_images_in_company_are_bit_for_bit_those_of_their_seeds_alone(model, recipe, size):
    engine = engine_of(model, recipe)
    width, height = size
    requests = [
        dataclasses.replace(
            REQUEST, width=width, height=height, seed=seed, prompt=f"{seed} boats", num_outputs=2
        )
        for seed in (10, 20, 30)
    ]
    alone = engine_of(model, recipe, batch_size=1)
    expected = [pictures(alone.submit(request)) for request in requests]

    # Twice: the first pass of a kind is also where the two ways are compared.
    for _ in range(2):
        with gathered(engine, dataclasses.replace(REQUEST, width=128)) as (passes, __):
            generations = [engine.submit(request) for request in requests]
            passes.go_on.set()
            made = [pictures(generation) for generation in generations]

    rows = 2 if recipe is GUIDED else 1
    assert max(passes.rows) == 6 * rows
    np.testing.assert_array_equal(made, expected)


def test_images_that_take_other_numbers_of_steps_share_passes_as_long_as_both_are_there(model):
    engine = engine_of(model, batch_size=4)
    requests = [dataclasses.replace(REQUEST, seed=steps, steps=steps) for steps in (1, 2, 4)]
    expected = [pictures(engine_of(model, batch_size=1).submit(request)) for request in requests]
    for _ in range(2):
        with gathered(engine, dataclasses.replace(REQUEST, width=96)) as (passes, __):
            generations = [engine.submit(request) for request in requests]
            passes.go_on.set()
            made = [pictures(generation) for generation in generations]

    assert passes.rows[-4:] == [3, 2, 1, 1]
    np.testing.assert_array_equal(made, expected)


def test_a_request_joins_one_that_is_halfway(model):
    engine = engine_of(model, GUIDED)
    late = dataclasses.replace(REQUEST, seed=7, steps=3)
    (expected,) = pictures(engine_of(model, GUIDED).submit(late))
    with gathered(engine, dataclasses.replace(REQUEST, steps=9)) as (passes, first):
        joining = engine.submit(late)
        ended: Queue[str] = Queue()
        for name, generation in (("first", first), ("late", joining)):
            generation.images[0].add_done_callback(lambda _, name=name: ended.put(name))
        passes.go_on.set()
        order = [ended.get(timeout=WAIT) for _ in range(2)]
        (joined,) = pictures(joining)

    assert order == ["late", "first"]
    # Three steps; the first pass of a kind is made once more, to learn from.
    assert passes.rows.count(4) == 3 + 1
    np.testing.assert_array_equal(joined, expected)


def test_who_leaves_makes_room_and_the_others_go_on(model):
    engine = engine_of(model, GUIDED)
    stays = dataclasses.replace(REQUEST, seed=8, steps=4)
    (expected,) = pictures(engine_of(model, GUIDED).submit(stays))
    with gathered(engine, dataclasses.replace(REQUEST, width=96, steps=1)) as (passes, __):
        leaving, staying = (
            engine.submit(dataclasses.replace(REQUEST, steps=50)),
            engine.submit(stays),
        )
        hook = engine._pipeline.unet.register_forward_hook(
            lambda _, inputs, __: leaving.cancel() if len(inputs[0]) == 4 else None
        )
        passes.go_on.set()
        (made,) = pictures(staying)
        hook.remove()

    assert leaving.images[0].cancelled()
    assert passes.rows.count(4) == 1 + 1  # to learn from
    np.testing.assert_array_equal(made, expected)


def test_who_runs_out_of_memory_in_company_is_made_alone(model):
    # The error cannot be had at will without filling the machine: a hook raises it where there are two at once.
    engine = engine_of(model)
    requests = [dataclasses.replace(REQUEST, seed=seed) for seed in (1, 2)]
    expected = [pictures(engine_of(model).submit(request)) for request in requests]

    def full_for_two(_: object, inputs: Sequence[torch.Tensor], __: object) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = engine._pipeline.unet.register_forward_hook(full_for_two)
    with gathered(engine, dataclasses.replace(REQUEST, width=96)) as (passes, __):
        generations = [engine.submit(request) for request in requests]
        passes.go_on.set()
        made = [pictures(generation) for generation in generations]
    hook.remove()

    np.testing.assert_array_equal(made, expected)


def test_who_fails_takes_nobody_along(model):
    engine = engine_of(model)
    good = dataclasses.replace(REQUEST, seed=2)
    (expected,) = pictures(engine_of(model).submit(good))
    marked = dataclasses.replace(REQUEST, seed=1, width=64, height=64)

    def full_for_the_first(_: object, inputs: Sequence[torch.Tensor], __: object) -> None:
        noise = torch.Generator().manual_seed(1)
        first = torch.randn(1, 4, 8, 8, generator=noise).sign()
        if any(torch.equal(own.sign(), first[0]) for own in inputs[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = engine._pipeline.unet.register_forward_hook(full_for_the_first)
    with gathered(engine, dataclasses.replace(REQUEST, width=96)) as (passes, __):
        bad, fine = engine.submit(marked), engine.submit(good)
        passes.go_on.set()
        with pytest.raises(OutOfMemoryError, match="one image of 64x64"):
            bad.images[0].result(WAIT)
        (made,) = pictures(fine)
    hook.remove()

    np.testing.assert_array_equal(made, expected)


def test_kernels_that_differ_in_company_end_it_and_nobody_notices(caplog):
    # This machine's do not, so the denoiser here adds what depends on how many rows there are.
    company = Company(4, exact=True)
    inputs = [{"sample": torch.full((1, 2), n), "timestep": torch.tensor(9)} for n in (1.0, 2.0)]

    def differing(batch: dict[str, torch.Tensor], alone: bool) -> torch.Tensor:
        return batch["sample"] + 1e-7 * len(batch["sample"])

    with caplog.at_level(logging.WARNING, logger="diffusion"):
        first, second = (company.predict(differing, inputs, ("any",), 1) for _ in range(2))

    for found in (first, second):
        for mine, own in zip(found, inputs, strict=True):
            assert torch.equal(mine, differing(own, alone=True))
    assert company.most == 1
    assert [record.getMessage().split(" differ ")[0] for record in caplog.records] == [
        "2 images in one pass"
    ]


def test_a_request_waits_for_company_no_longer_than_it_is_told_to(model):
    engine = engine_of(model, batch_size=4, batch_seconds=0.05)

    assert engine.submit(REQUEST).images[0].result(WAIT).timings["wait"] >= 0.05


def test_a_group_that_is_full_does_not_wait(model):
    engine = engine_of(model, batch_size=4, batch_seconds=WAIT)

    made = pictures(engine.submit(dataclasses.replace(REQUEST, num_outputs=4)))

    assert len(made) == 4


def test_calls_that_come_out_alike_are_made_for_all_at_once_and_others_are_not():
    # The first layer here is one kernel for any number of rows; the second chooses by how many there are.
    calls: list[int] = []

    def counting(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows @ weight.T + (1e-7 * len(rows) if weight is differs else 0.0)

    alike, differs = torch.eye(4), torch.ones(8, 4)
    company = Company(4, exact=True)
    inputs = [
        {"sample": torch.arange(4.0)[None] + n, "timestep": torch.tensor(9)} for n in range(3)
    ]

    def predict(batch: dict[str, torch.Tensor], alone: bool) -> torch.Tensor:
        rows = torch.nn.functional.linear(batch["sample"], alike)
        return torch.nn.functional.linear(rows, differs)

    original = torch.nn.functional.linear
    expected = [own["sample"] @ alike.T @ differs.T + 1e-7 for own in inputs]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", _Overridable(counting))
        patched.setattr(
            "diffusion.company._CHOOSE_BY_SHAPE", frozenset({torch.nn.functional.linear})
        )
        company.predict(predict, inputs, ("any",), 1)
        calls.clear()
        made = company.predict(predict, inputs, ("any",), 1)
    assert torch.nn.functional.linear is original

    assert calls == [3, 1, 1, 1]
    assert company.most == 4
    for mine, own in zip(made, expected, strict=True):
        assert torch.equal(mine, own)


class _Overridable:
    """A function that torch lets its modes see, as it does its own."""

    def __init__(self, function) -> None:
        self._function = function

    def __call__(self, *args):
        from torch.overrides import handle_torch_function, has_torch_function

        if has_torch_function(args):
            return handle_torch_function(self, args, *args)
        return self._function(*args)
