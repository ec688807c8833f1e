"""A new version takes over while requests come and go: each has one version for all its images, and none is dropped."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
import pytest

from diffusion.engine import Engine
from diffusion.errors import BusyError, RequestError
from tests.diffusion.refreshing import (
    REQUEST,
    assert_same_images,
    images,
    serve,
    staged,
)
from tests.diffusion.support import (
    LIGHTNING,
    pixels,
)


def await_closed(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while not engine._loop.pausing:
        assert time.monotonic() < deadline


@dataclass(frozen=True)
class Held:
    """The device in the middle of a step, until it may go on."""

    reached: Event
    go_on: Event


@contextmanager
def held(engine: Engine) -> Iterator[Held]:
    device = Held(Event(), Event())

    def hold(*_: object) -> None:
        device.reached.set()
        assert device.go_on.wait(120)

    hook = engine._pipeline.unet.register_forward_hook(hold)
    try:
        yield device
    finally:
        device.go_on.set()
        hook.remove()


def test_a_request_under_way_ends_with_its_version_and_the_next_one_has_the_new(model, update):
    engine = serve(model)
    of_old, of_new = (images(serve(folder), num_outputs=3) for folder in (model, update))
    waiting = staged(update)
    request = replace(REQUEST, num_outputs=3)
    later = engine.generate(request)

    with ThreadPoolExecutor(3) as pool, held(engine) as device:
        under_way = pool.submit(list, engine.generate(request))
        assert device.reached.wait(60)
        swap = pool.submit(engine.replace, waiting)
        await_closed(engine)
        # It was checked before, but has no image yet, so it is the new version's.
        afterwards = pool.submit(list, later)
        device.go_on.set()
        made = under_way.result(200)
        assert swap.result(200) > 0
        new = afterwards.result(200)

    assert [image.version for image in made] == ["old"] * 3
    assert [image.version for image in new] == ["new"] * 3
    for ours, expected in ((made, of_old), (new, of_new)):
        for image, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(pixels(image.image), other)


def test_a_request_that_had_not_begun_is_asked_of_the_new_recipe(model, update):
    engine = serve(model)
    waiting = engine.generate(replace(REQUEST, steps=2))
    open_steps = engine.generate(replace(REQUEST, steps=None))

    engine.replace(staged(update, LIGHTNING.model_copy(update={"steps": (1,), "default_steps": 1})))

    with pytest.raises(RequestError, match="num_inference_steps is 2"):
        list(waiting)
    (made,) = open_steps
    assert (made.steps, made.version) == (1, "new")


def test_a_request_dropped_or_cancelled_halfway_does_not_keep_the_new_version_out(model, update):
    engine, cancelled = serve(model), Event()
    request = replace(REQUEST, num_outputs=4)
    dropped, closed, ended = (engine.generate(request, cancelled) for _ in range(3))
    for iterator in (dropped, closed, ended):
        next(iterator)

    del dropped, iterator
    closed.close()
    cancelled.set()
    assert list(ended) == []

    # The device may be in a step of theirs, and they leave after it.
    assert engine.replace(staged(update), patience=60.0) > 0


def test_a_request_that_fails_does_not_keep_the_new_version_out(model, update):
    engine = serve(model)

    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    hook = engine._pipeline.unet.mid_block.register_forward_hook(fail)
    failing = engine.generate(replace(REQUEST, num_outputs=2))
    with pytest.raises(RuntimeError, match="something else"):
        next(failing)
    hook.remove()

    assert engine.replace(staged(update), patience=0.0) > 0


def test_the_last_image_is_handed_out_with_the_model_given_back(model, update):
    engine = serve(model)
    request = engine.generate(replace(REQUEST, num_outputs=2))
    next(request), next(request)

    assert engine.replace(staged(update), patience=0.0) > 0


def test_requests_without_end_do_not_keep_the_new_version_out(model, update):
    engine, stop = serve(model), Event()
    expected = {
        version: images(serve(folder), num_outputs=2)
        for version, folder in (("old", model), ("new", update))
    }

    def ask_again_and_again() -> list[list[Any]]:
        answers = []
        while not stop.is_set():
            answers.append(list(engine.generate(replace(REQUEST, num_outputs=2))))
        return answers

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(ask_again_and_again) for _ in range(3)]
        try:
            for version, folder in (("new", update), ("old", model)):
                waiting = dataclasses.replace(staged(folder), version=version)
                engine.replace(waiting, patience=200)
        finally:
            stop.set()
        answers = [answer for caller in callers for answer in caller.result(200)]

    assert len(answers) >= 3
    for answer in answers:
        (version,) = {image.version for image in answer}
        for image, other in zip(answer, expected[version], strict=True):
            np.testing.assert_array_equal(pixels(image.image), other)


def test_a_request_that_takes_too_long_leaves_the_old_version_and_it_can_be_tried_again(
    model, update
):
    engine, waiting = serve(model), staged(update)

    with ThreadPoolExecutor(1) as pool, held(engine) as device:
        under_way = pool.submit(list, engine.generate(replace(REQUEST, num_outputs=2)))
        assert device.reached.wait(60)
        with pytest.raises(BusyError, match="try again"):
            engine.replace(waiting, patience=0.0)
        device.go_on.set()
        assert [image.version for image in under_way.result(200)] == ["old"] * 2

    assert_same_images(engine, serve(model))
    engine.replace(waiting)
    assert_same_images(engine, serve(update))
