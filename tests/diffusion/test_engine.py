"""The engine in use: what it says, what it survives, and how requests share the device."""

import dataclasses
import gc
import logging
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import torch

from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import DeviceError, NonFiniteError, OutOfMemoryError, RequestError
from tests.diffusion.support import GUIDED, LIGHTNING, build, pixels

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=1, seed=3)


def said_here(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("diffusion.")]


def only(images):
    (image,) = images
    return image


def test_an_image_says_what_it_took_to_make_it(lightning):
    generated = only(lightning.generate(dataclasses.replace(REQUEST, steps=None)))

    assert generated.image.size == (64, 64)
    assert (generated.seed, generated.steps, generated.guidance_scale) == (3, 4, 0.0)
    assert list(generated.timings) == ["wait", "prompt", "denoise", "decode"]
    assert all(generated.timings[stage] > 0 for stage in ("prompt", "denoise", "decode"))


def test_the_image_of_a_random_seed_can_be_made_again(lightning):
    generated = only(lightning.generate(dataclasses.replace(REQUEST, seed=None)))
    again = only(lightning.generate(dataclasses.replace(REQUEST, seed=generated.seed)))

    np.testing.assert_array_equal(pixels(generated.image), pixels(again.image))


def test_a_prompt_is_encoded_once_for_all_images_of_a_request(lightning):
    first, *others = lightning.generate(dataclasses.replace(REQUEST, num_outputs=3))

    assert first.timings["prompt"] > 0
    assert [other.timings["prompt"] for other in others] == [0.0, 0.0]


def test_a_request_is_refused_before_anything_is_generated(lightning):
    # Not only when the first image is asked for: a caller learns of it at once.
    with pytest.raises(RequestError, match=r"num_inference_steps is 3; .* 1 or 2 or 4"):
        lightning.generate(dataclasses.replace(REQUEST, steps=3))
    with pytest.raises(RequestError, match="multiples of 32"):
        lightning.generate(dataclasses.replace(REQUEST, width=72))


def test_a_caller_s_guidance_scale_is_ignored_with_one_line_however_many_images(lightning, caplog):
    request = dataclasses.replace(REQUEST, num_outputs=2)
    plain = list(lightning.generate(request))

    with caplog.at_level(logging.INFO, logger="diffusion"):
        guided = list(lightning.generate(dataclasses.replace(request, guidance_scale=3.5)))

    assert said_here(caplog) == [
        "Ignoring guidance_scale 3.5: this checkpoint was distilled without guidance and runs at 0."
    ]
    for one, other in zip(plain, guided, strict=True):
        np.testing.assert_array_equal(pixels(one.image), pixels(other.image))


def test_a_prompt_beyond_600_tokens_is_reported_once_with_how_much_was_dropped(guided, caplog):
    request = dataclasses.replace(
        REQUEST, prompt="red " * 625, negative_prompt="green " * 605, num_outputs=2
    )

    with caplog.at_level(logging.INFO, logger="diffusion"):
        list(guided.generate(request))

    assert said_here(caplog) == [
        "The prompt is 625 tokens long: the last 25 were dropped, since only 600 are read of any.",
        "The negative_prompt is 605 tokens long: the last 5 were dropped, since only 600 are read of any.",
    ]


def test_a_prompt_of_600_tokens_is_not_worth_a_line(guided, caplog):
    with caplog.at_level(logging.INFO, logger="diffusion"):
        list(guided.generate(dataclasses.replace(REQUEST, prompt="red " * 600)))

    assert said_here(caplog) == []


def test_nothing_is_written_to_the_terminal_by_the_libraries_below(model):
    # In a child, where this room is imported before transformers and diffusers, as the doors do.
    code = """
import sys
from pathlib import Path
from diffusion.engine import GenerationRequest
from tests.diffusion.support import build_engine
engine = build_engine(Path(sys.argv[1]))
list(engine.generate(GenerationRequest("red " * 700, 64, 64, steps=1)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        text=True,
        capture_output=True,
        check=True,
        timeout=120,
    )

    # What remains is this room's own line; Python prints warnings that nothing else handles.
    assert run.stdout == ""
    assert run.stderr.splitlines() == [
        "The prompt is 700 tokens long: the last 100 were dropped, since only 600 are read of any."
    ]


@pytest.mark.parametrize("recipe", [LIGHTNING, GUIDED])
def test_warming_up_generates_at_the_native_size_and_takes_a_step_count_the_checkpoint_has(
    model, recipe
):
    small = recipe.model_copy(update={"native_size": 64})
    if small.steps:
        small = small.model_copy(update={"steps": (2, 4)})
    pipeline = build(model, small)
    seen = []
    pipeline.vae.decoder.register_forward_hook(lambda _, inputs, out: seen.append(out.shape))

    assert Engine(pipeline, small).warm_up() > 0

    assert seen == [(1, 3, 64, 64)]


def test_the_pipeline_s_own_scheduler_takes_no_step(model):
    # A scheduler counts steps and remembers past ones; nothing of that may reach the next image.
    pipeline = build(model)

    list(Engine(pipeline, LIGHTNING).generate(dataclasses.replace(REQUEST, num_outputs=2)))

    assert pipeline.scheduler.step_index is None
    assert pipeline.scheduler.num_inference_steps is None


def test_requests_at_the_same_time_give_the_images_they_give_alone(guided):
    requests = [
        dataclasses.replace(REQUEST, seed=50, steps=3, num_outputs=2, guidance_scale=6.0),
        dataclasses.replace(REQUEST, seed=60, steps=2, num_outputs=2, width=96, prompt="a cat"),
        dataclasses.replace(REQUEST, seed=70, steps=4, negative_prompt="red"),
    ]
    alone = [[pixels(made.image) for made in guided.generate(request)] for request in requests]
    together = Barrier(len(requests))

    def run(request: GenerationRequest) -> list[np.ndarray]:
        together.wait()
        return [pixels(made.image) for made in guided.generate(request)]

    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(run, requests))

    for mine, expected in zip(results, alone, strict=True):
        for image, other in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(image, other)


def test_a_request_for_many_images_lets_others_go_between_them(lightning):
    many = lightning.generate(dataclasses.replace(REQUEST, num_outputs=50))
    next(many)

    # The device is free although `many` has only begun; a lock held for the whole request would hang here.
    assert only(lightning.generate(REQUEST)).seed == 3
    assert next(many).seed == 4


def test_a_cancelled_request_ends_after_the_step_it_is_in(model, caplog):
    pipeline = build(model, GUIDED)
    engine = Engine(pipeline, GUIDED, batch_size=1)
    cancelled = Event()
    steps = []

    def cancel_in_the_third_step(*_: object) -> None:
        steps.append(None)
        if len(steps) == 3:
            cancelled.set()

    hook = pipeline.unet.register_forward_hook(cancel_in_the_third_step)
    with caplog.at_level(logging.INFO, logger="diffusion"):
        request = dataclasses.replace(REQUEST, steps=50, num_outputs=4)
        assert list(engine.generate(request, cancelled)) == []
    hook.remove()

    assert len(steps) == 3
    assert said_here(caplog) == ["Cancelled: seed 3 ended after step 3 of 50."]
    assert only(engine.generate(REQUEST)).seed == 3


def test_an_image_cancelled_in_its_last_step_is_not_decoded(model):
    pipeline = build(model)
    cancelled = Event()
    decoded = []
    pipeline.unet.register_forward_hook(lambda *_: cancelled.set())
    pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(None))

    assert list(Engine(pipeline, LIGHTNING).generate(REQUEST, cancelled)) == []

    assert decoded == []


def test_a_request_cancelled_between_two_images_makes_no_more(lightning):
    cancelled = Event()
    images = lightning.generate(dataclasses.replace(REQUEST, num_outputs=4), cancelled)
    assert next(images).seed == 3

    cancelled.set()

    assert list(images) == []


def test_a_request_cancelled_while_it_waits_for_its_turn_takes_no_step(model):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    begun, go_on, cancelled = Event(), Event(), Event()
    sizes = []

    def hold_the_device(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        sizes.append(tuple(inputs[0].shape[2:]))
        begun.set()
        assert go_on.wait(60)

    pipeline.unet.register_forward_hook(hold_the_device)
    first = Thread(target=lambda: list(engine.generate(REQUEST)))
    first.start()
    assert begun.wait(60)
    left = []
    waiting = engine.generate(dataclasses.replace(REQUEST, width=96), cancelled)
    second = Thread(target=lambda: left.extend(waiting))
    second.start()

    cancelled.set()
    go_on.set()
    first.join(60)
    second.join(60)

    assert left == []
    assert sizes == [(8, 8)]


def test_latents_that_overflow_are_named_and_the_engine_goes_on(model):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    weight = pipeline.unet.conv_out.bias
    value = weight[0].item()

    weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"Denoising seed 3 gave latents with NaN"):
        list(engine.generate(REQUEST))

    weight[0] = value
    assert only(engine.generate(REQUEST)).image.size == (64, 64)


def test_a_vae_that_overflows_is_named_instead_of_a_black_image(model):
    pipeline = build(model)
    pipeline.vae.decoder.conv_out.bias[0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"Decoding seed 3 .*VAE in torch.float32.*black"):
        list(Engine(pipeline, LIGHTNING).generate(REQUEST))


def test_a_vae_that_overflows_in_float16_is_named_with_the_one_that_does_not(model):
    pipeline = build(model)
    pipeline.vae.half()
    pipeline.vae.decoder.conv_out.bias[0] = float("inf")

    with pytest.raises(NonFiniteError, match="madebyollin/sdxl-vae-fp16-fix"):
        list(Engine(pipeline, LIGHTNING).generate(REQUEST))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB.\nMore"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_fails_one_request_with_advice_and_frees_what_it_took(model, kind, words):
    # The error itself cannot be had at will without filling the machine, so a hook in the UNet raises it, as
    # an allocation inside would. The tensor it took by then must be gone when the caller hears of it.
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    taken = []

    def allocate(*_: object) -> None:
        tensor = torch.zeros(64)
        taken.append(weakref.ref(tensor))
        raise kind(words)

    hook = pipeline.unet.mid_block.register_forward_hook(allocate)
    gc.disable()  # so that only what the engine itself lets go of is gone
    try:
        list(engine.generate(REQUEST))
    except OutOfMemoryError as raised:
        still_there = taken[0]() is not None
        message = str(raised)
    finally:
        gc.enable()
        hook.remove()

    assert not still_there
    assert "one image of 64x64" in message
    assert "Ask for a smaller size" in message
    assert only(engine.generate(REQUEST)).seed == 3


def test_any_other_failure_passes_through_and_leaves_the_device_free(model):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)

    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    hook = pipeline.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        list(engine.generate(REQUEST))
    hook.remove()

    assert only(engine.generate(REQUEST)).seed == 3


def test_nothing_is_kept_of_a_request_that_is_over(guided):
    def tensors() -> int:
        # A picture is given out while its thread still holds what it was made from.
        guided._loop.when_idle(lambda: None).result(60)
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    list(guided.generate(REQUEST))
    before = tensors()
    for _ in range(3):
        list(guided.generate(REQUEST))

    assert tensors() == before


def test_what_can_wait_is_done_when_there_is_no_request(model):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    done: list[str] = []
    begun, go_on = Event(), Event()

    def hold_the_device(*_: object) -> None:
        begun.set()
        assert go_on.wait(60)

    pipeline.unet.register_forward_hook(hold_the_device)
    first = engine.submit(REQUEST)
    assert begun.wait(60)
    chore = engine._loop.when_idle(lambda: done.append("chore"))
    second = engine.submit(dataclasses.replace(REQUEST, width=96))
    second.images[0].add_done_callback(lambda _: done.append("second"))
    go_on.set()

    chore.result(60)

    assert done == ["second", "chore"]
    assert first.images[0].result(60).seed == 3


def test_what_can_wait_and_fails_is_told_and_requests_go_on(lightning):
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lightning._loop.when_idle(fail).result(60)

    assert only(lightning.generate(REQUEST)).seed == 3


def test_making_a_size_ready_changes_no_image(lightning):
    plain = only(lightning.generate(REQUEST))

    lightning._readiness._chore((64, 64, 2), learn=False).result(60)

    again = only(lightning.generate(REQUEST))
    np.testing.assert_array_equal(pixels(plain.image), pixels(again.image))


def test_an_engine_that_is_gone_leaves_no_thread(model):
    engine = Engine(build(model), LIGHTNING)
    list(engine.generate(REQUEST))
    thread = engine._loop._thread
    assert thread is not None

    del engine
    gc.collect()

    thread.join(60)
    assert not thread.is_alive()


def test_a_device_that_fails_fails_who_is_open_and_the_next_is_served(model, monkeypatch):
    engine = Engine(build(model), LIGHTNING)
    with monkeypatch.context() as patched:
        patched.setattr(
            engine._loop,
            "_keep_pace",
            lambda: (_ for _ in ()).throw(RuntimeError("card lost\nmore")),
        )
        with pytest.raises(DeviceError, match=r"The device cpu failed \(card lost\)\. Try again"):
            only(engine.generate(REQUEST))

    assert only(engine.generate(REQUEST)).seed == 3
    assert not engine._loop._begun


def test_results_that_never_come_fail_their_request(model, monkeypatch):
    engine = Engine(build(model), LIGHTNING)

    def lost(_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(engine._loop._clock, "wait", lost)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.submit(REQUEST).images[0].result(60)

    assert only(engine.generate(REQUEST)).seed == 3
    assert not engine._loop._begun


def test_a_chore_that_fails_keeps_nothing(lightning):
    kept = []

    def fail() -> None:
        tensor = torch.zeros(64)
        kept.append(weakref.ref(tensor))
        raise RuntimeError("no")

    failed = lightning._loop.when_idle(fail)
    gc.disable()
    try:
        assert str(failed.exception(60)) == "RuntimeError: no"
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_pass_of_several_that_fails_is_not_tried_with_as_many_again(model, caplog):
    engine = Engine(build(model), LIGHTNING)
    rows = []

    def full_for_many(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        rows.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    engine._pipeline.unet.register_forward_hook(full_for_many)
    for _ in range(2):
        made = list(engine.generate(dataclasses.replace(REQUEST, num_outputs=4)))
        assert len(made) == 4

    assert sum(count > 2 for count in rows) == 1
    assert caplog.text.count("a pass of several images failed") == 1


def test_a_caller_s_own_event_is_never_set(lightning):
    cancelled = Event()

    assert only(lightning.generate(REQUEST, cancelled)).seed == 3
    assert only(lightning.generate(REQUEST, cancelled)).seed == 3

    assert not cancelled.is_set()
