"""Several models on one device: each one's images, whoever was served in between."""

import dataclasses
import logging
from pathlib import Path
from queue import Queue
from threading import Event

import numpy as np
import pytest
import torch

from demo.small_sdxl import write_small_sdxl
from diffusion import device_loop
from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import ModelError, OutOfMemoryError, RequestError
from diffusion.float8 import Float8Layers
from diffusion.recipe import Recipe
from diffusion.refresh import Staged, stage
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    build,
    edited,
    pixels,
    read_configs,
    read_tensors,
)

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=2, seed=3)
WAIT = 120


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sdxl(tmp_path_factory.mktemp("small-sdxl-other"), seed=1)


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sdxl(tmp_path_factory.mktemp("small-sdxl-third"), seed=2)


def staged(folder: Path, recipe: Recipe = LIGHTNING, version: str = "v1", **changes) -> Staged:
    given = {"configs": read_configs(folder), "tensors": read_tensors(folder)} | changes
    return stage(given["configs"], given["tensors"], recipe, version)


def both(model: Path, other: Path, recipe: Recipe = LIGHTNING) -> Engine:
    engine = Engine(build(model), LIGHTNING, "v1", name="one")
    engine.add_model("two", staged(other, recipe))
    return engine


def image(engine: Engine, name: str | None = None, **changes) -> np.ndarray:
    (made,) = engine.generate(dataclasses.replace(REQUEST, model=name, **changes))
    return pixels(made.image)


def alone(folder: Path, recipe: Recipe = LIGHTNING, **changes) -> np.ndarray:
    return image(Engine(build(folder, recipe), recipe), **changes)


def test_every_model_makes_its_own_images_in_the_memory_of_the_first(model, other):
    engine = both(model, other)
    places = [parameter.data_ptr() for parameter in engine._pipeline.unet.parameters()]
    expected = {"one": alone(model), "two": alone(other), None: alone(model)}

    for name in ("one", "two", "two", None, "two", "one"):
        np.testing.assert_array_equal(image(engine, name), expected[name])

    assert [parameter.data_ptr() for parameter in engine._pipeline.unet.parameters()] == places
    assert engine.models == ("one", "two")


def test_every_model_is_run_by_its_own_recipe(model, other):
    engine = both(model, other, GUIDED)

    made = image(engine, "two", steps=3, negative_prompt="red")

    expected = alone(other, GUIDED, steps=3, negative_prompt="red")
    np.testing.assert_array_equal(made, expected)
    with pytest.raises(RequestError, match="num_inference_steps is 3"):
        image(engine, "one", steps=3)


def test_a_model_that_is_not_there_is_refused_with_those_that_are(model, other):
    engine = both(model, other)

    with pytest.raises(RequestError, match=r"model is 'three'; this server has 'one', 'two'\."):
        engine.generate(dataclasses.replace(REQUEST, model="three"))


def test_images_of_several_models_asked_for_at_once_are_those_of_each_alone(model, other, third):
    engine = both(model, other)
    engine.add_model("three", staged(third))
    folders = {"one": model, "two": other, "three": third}
    requests = [
        dataclasses.replace(REQUEST, model=name, seed=seed, num_outputs=2)
        for seed in range(0, 9, 2)
        for name in folders
    ]

    generations = [engine.submit(request) for request in requests]

    for request, generation in zip(requests, generations, strict=True):
        single = Engine(build(folders[request.model]), LIGHTNING)
        expected = single.generate(dataclasses.replace(request, model=None))
        for ours, theirs in zip(generation.images, expected, strict=True):
            np.testing.assert_array_equal(pixels(ours.result(WAIT).image), pixels(theirs.image))


def test_requests_are_grouped_by_model_but_nobody_waits_for_ever(model, other, monkeypatch):
    def order_of_service(shortest_turn: float) -> list[str]:
        monkeypatch.setattr(device_loop, "SHORTEST_TURN", shortest_turn)
        monkeypatch.setattr(device_loop, "SWITCHES_IN_A_TURN", 0)
        engine = Engine(build(model), LIGHTNING, name="one", batch_size=1)
        engine.add_model("two", staged(other))
        served: Queue[str] = Queue()
        begun, go_on = Event(), Event()

        def hold(*_: object) -> None:
            begun.set()
            assert go_on.wait(WAIT)

        hook = engine._pipeline.unet.register_forward_hook(hold)
        generations = [engine.submit(dataclasses.replace(REQUEST, model="one", width=96))]
        assert begun.wait(WAIT)
        for name in ("two", "one", "two", "one"):
            generation = engine.submit(dataclasses.replace(REQUEST, model=name))
            generation.images[0].add_done_callback(lambda _, name=name: served.put(name))
            generations.append(generation)
        go_on.set()
        # A future's `result` may return before its callbacks have run.
        order = [served.get(timeout=WAIT) for _ in range(4)]
        hook.remove()
        for generation in generations:
            generation.images[0].result(WAIT)
        return order

    assert order_of_service(shortest_turn=WAIT) == ["one", "one", "two", "two"]
    assert order_of_service(shortest_turn=0.0) == ["two", "one", "two", "one"]


def test_what_models_have_in_common_waits_once_and_is_not_copied(model, other):
    engine = Engine(build(model), LIGHTNING, name="one")
    same_but_its_unet = [
        tensor
        for folder, wanted in ((model, False), (other, True))
        for tensor in read_tensors(folder)
        if tensor.path.startswith("unet/") == wanted
    ]
    engine.add_model("two", staged(other, tensors=iter(same_but_its_unet)))
    shelf = engine._loop.shelf
    one, two = (shelf._waiting[name] for name in ("one", "two"))

    shared = {key for key in one if one[key] is two[key]}

    assert {key for key in one if not key.startswith("unet: ")} <= shared
    assert any(key not in shared for key in one)
    before = {key: shelf._places[key]._version for key in shared}
    image(engine, "two")
    assert {key: shelf._places[key]._version for key in shared} == before


def test_a_new_version_of_a_model_takes_over_whether_it_is_on_the_device_or_not(
    model, other, third
):
    engine = both(model, other)
    image(engine, "one")

    engine.replace(staged(third, version="v2"), name="two")
    np.testing.assert_array_equal(image(engine, "two"), alone(third))
    assert (engine.version_of("one"), engine.version_of("two")) == ("v1", "v2")

    engine.replace(staged(other, version="v3"), name="two")  # which is the one on the device now
    np.testing.assert_array_equal(image(engine, "two"), alone(other))
    np.testing.assert_array_equal(image(engine, "one"), alone(model))
    assert engine.version_of("two") == "v3"


def test_a_model_that_is_built_differently_is_refused_and_the_first_goes_on(model, other):
    engine = Engine(build(model), LIGHTNING, name="one")
    configs = edited(read_configs(other), "vae/config.json", scaling_factor=0.2)

    with pytest.raises(ModelError, match="two cannot share a card with one: its vae is built diff"):
        engine.add_model("two", staged(other, configs=configs))

    assert engine.models == ("one",)
    np.testing.assert_array_equal(image(engine), alone(model))
    engine.replace(staged(other))
    np.testing.assert_array_equal(image(engine), alone(other))


def test_a_vae_that_has_to_be_float32_does_not_join_one_in_float16(model, other):
    engine = Engine(build(model, dtype=torch.float16), LIGHTNING, name="one")
    overflowing = LIGHTNING.model_copy(update={"vae_overflows": True})

    with pytest.raises(ModelError, match="its VAE overflows there"):
        engine.add_model("two", staged(other, overflowing))


def test_a_switch_has_a_stage_of_its_own(model, other, caplog):
    engine = both(model, other)
    with caplog.at_level(logging.INFO, logger="diffusion"):
        (made,) = engine.generate(dataclasses.replace(REQUEST, model="two"))

    assert made.timings["switch"] > 0


class Full(torch.Tensor):
    """A place on the device with no room for what a copy takes."""

    def copy_(self, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_a_switch_that_fails_halfway_fails_its_request_and_mixes_nothing(model, other):
    engine = both(model, other)
    expected = {"one": alone(model), "two": alone(other)}
    places = engine._loop.shelf._places
    key = [key for key in places if key.startswith("unet: ")][50]

    room = places[key]
    places[key] = room.as_subclass(Full)
    with pytest.raises(OutOfMemoryError):
        image(engine, "two")
    places[key] = room

    for name in ("one", "two", "one"):
        np.testing.assert_array_equal(image(engine, name), expected[name])


def test_layers_in_8_bits_follow_the_model_whose_turn_it_is(model, other):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING, name="one", batch_size=1)
    layers = Float8Layers(pipeline.unet, smallest_side=32)
    layers.switch(on=True)
    engine._loop.shelf._changed = layers.refresh
    engine.add_model("two", staged(other))

    def rounded(folder: Path) -> np.ndarray:
        built = build(folder)
        Float8Layers(built.unet, smallest_side=32).switch(on=True)
        return image(Engine(built, LIGHTNING, batch_size=1))

    for name, folder in (("two", other), ("one", model), ("two", other)):
        np.testing.assert_array_equal(image(engine, name), rounded(folder))


def test_what_waits_lies_as_its_place_does_and_in_one_piece(model, other):
    pipeline = build(model)
    pipeline.unet.to(memory_format=torch.channels_last)
    engine = Engine(pipeline, LIGHTNING, name="one")
    engine.add_model("two", staged(other))
    shelf = engine._loop.shelf

    waiting = shelf._waiting["two"]

    assert all(tensor.stride() == shelf._places[key].stride() for key, tensor in waiting.items())
    own = [tensor for key, tensor in waiting.items() if tensor is not shelf._waiting["one"][key]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in own}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in own)


def test_a_new_version_that_fails_halfway_leaves_the_old_one_whole(model, other, third):
    engine = both(model, other)
    image(engine, "two")
    places = engine._loop.shelf._places
    key = [key for key in places if key.startswith("unet: ")][50]

    room = places[key]
    places[key] = room.as_subclass(Full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        engine.replace(staged(third, version="v2"), name="two")
    places[key] = room

    assert engine.version_of("two") == "v1"
    np.testing.assert_array_equal(image(engine, "two"), alone(other))
    np.testing.assert_array_equal(image(engine, "one"), alone(model))
