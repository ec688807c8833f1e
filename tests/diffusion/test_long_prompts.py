"""Prompts beyond 77 tokens: read piece by piece up to 600, and what is said of the rest."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.engine import Engine
from diffusion.errors import RequestError
from tests.diffusion.prompting import (
    LONG,
    PROMPT,
    REQUEST,
    Model,
    assert_close,
    distance,
    images,
)
from tests.diffusion.support import (
    GUIDED,
    build,
    edited,
    pixels,
    read_configs,
)


@pytest.mark.parametrize("negative", [None, "ugly", "blurry and ugly, " * 60])
@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize("weighting", [False, True])
def test_words_beyond_the_77th_token_matter(small, negative, guidance_scale, weighting):
    call = {
        "negative_prompt": negative,
        "guidance_scale": guidance_scale,
        "prompt_weighting": weighting,
    }
    first, second = (
        small.encode(prompt=prompt, **call) for prompt in (LONG, LONG.replace("dragon", "bird"))
    )

    width = small.stocks("")["prompt_embeds"].shape[2]
    length = first["prompt_embeds"].shape[1]
    assert length % 77 == 0
    assert length > 77
    assert first["prompt_embeds"].shape == (1, length, width)
    assert distance(first, second) > 0.01
    if guidance_scale > 1:
        assert first["negative_prompt_embeds"].shape == first["prompt_embeds"].shape
    else:
        assert first["negative_prompt_embeds"] is None


def test_each_piece_of_a_long_prompt_is_what_stock_makes_of_it(small):
    sentences = ["a golden fox over the castle " * 8, "a red dragon in the snow " * 9]
    prompt = ". ".join(sentences)

    long = small.encode(prompt=prompt)["prompt_embeds"]

    first, second = (
        small.stocks(part)["prompt_embeds"] for part in (f"{sentences[0]}.", sentences[1])
    )
    torch.testing.assert_close(long, torch.cat([first, second], dim=1))


def test_a_long_negative_prompt_has_a_short_prompt_followed_by_empty_pieces(small):
    embeddings = small.encode(negative_prompt=LONG)

    both = embeddings["prompt_embeds"], embeddings["negative_prompt_embeds"]
    assert both[0].shape == both[1].shape
    assert_close(
        {"piece": both[0][:, :77], "next": both[0][:, 77:154]},
        {
            "piece": small.stocks(PROMPT)["prompt_embeds"],
            "next": small.stocks("")["prompt_embeds"],
        },
    )


def test_nothing_to_avoid_is_zeros_at_any_length_where_stock_has_zeros(model, small):
    long = small.encode(prompt=LONG)
    negatives = {name: tensor for name, tensor in long.items() if name.startswith("negative_")}

    stock_has_zeros = not small.stocks("red")["negative_prompt_embeds"].any()
    assert stock_has_zeros == ("pooled_prompt_embeds" in long)
    for name, tensor in negatives.items():
        assert tensor.shape == long[name.removeprefix("negative_")].shape
        assert bool(tensor.any()) != stock_has_zeros


def test_where_stock_has_an_empty_prompt_s_instead_of_zeros_a_long_prompt_has_them_too(model):
    configs = edited(read_configs(model), "model_index.json", force_zeros_for_empty_prompt=False)
    other = Model(model, GUIDED, build(model, GUIDED, configs=configs))

    long = other.encode(prompt=LONG)

    empty = other.stocks("red")
    torch.testing.assert_close(
        long["negative_prompt_embeds"][:, :77], empty["negative_prompt_embeds"]
    )
    torch.testing.assert_close(
        long["negative_pooled_prompt_embeds"], empty["negative_pooled_prompt_embeds"]
    )


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_images_of_long_prompts_are_made(small, guidance_scale):
    engine = Engine(small.pipeline, small.recipe)

    def one(prompt: str, **changes: Any) -> np.ndarray:
        return images(engine, prompt=prompt, guidance_scale=guidance_scale, **changes)[0]

    assert (one(LONG) != one(LONG.replace("dragon", "bird"))).any()
    assert one(f"(red)1.5 {LONG}", negative_prompt="ugly", prompt_weighting=True).any()


def test_prompts_of_any_length_in_company_give_the_images_they_give_alone(sdxl):
    engine = Engine(sdxl.pipeline, GUIDED)
    requests = [
        dataclasses.replace(REQUEST, prompt=prompt, seed=seed, prompt_weighting=weighting)
        for seed, (prompt, weighting) in enumerate(
            [(PROMPT, False), (LONG, False), (f"(red)1.5 {LONG}", True), (f"{LONG} {LONG}", False)]
        )
    ]
    alone = [pixels(made.image) for request in requests for made in engine.generate(request)]

    together = [engine.submit(request).images[0] for request in requests]

    for image, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(pixels(image.result(200).image), expected)


@pytest.mark.parametrize(
    ("prompt", "weighting", "dropped"),
    [
        ("red " * 2_500, False, 1_900),
        ("red " * 2_500, True, 1_900),
        ("(red)1.2 fox " * 769, True, 938),
        ("(red fox " + "a " * 4_000 + ")1.2", True, 3_402),
        ("🙂" * 10_000, False, None),
        ("a. b " * 2_000, False, None),
    ],
)
def test_ten_thousand_characters_are_read_as_far_as_600_tokens_go(
    sdxl, caplog, prompt, weighting, dropped
):
    with sdxl.runs() as runs, caplog.at_level(logging.INFO, logger="diffusion"):
        embeddings = sdxl.encode(prompt=prompt[:10_000], prompt_weighting=weighting)

    # At most twice eight pieces and one for the pooled embedding, and what an empty prompt gives.
    assert len(runs) <= 2 * (16 + 1) + 1
    assert 8 * 77 <= embeddings["prompt_embeds"].shape[1] <= 16 * 77
    (said,) = [record.getMessage() for record in caplog.records]
    assert "were dropped, since only 600 are read of any" in said
    assert dropped is None or f"the last {dropped} were dropped" in said


def test_what_is_dropped_is_said_again_to_whoever_asks_again(sdxl, caplog):
    prompts = sdxl.prompts()
    with caplog.at_level(logging.INFO, logger="diffusion"):
        for _ in range(2):
            sdxl.encode(prompts, prompt="red " * 601)

    assert len(caplog.records) == 2


def test_a_failure_of_the_library_fails_one_request_with_advice(sdxl, caplog):
    prompts = sdxl.prompts()

    def fail(*_: object) -> None:
        raise ValueError("of another kind")

    hook = sdxl.pipeline.text_encoder_2.register_forward_hook(fail)
    with pytest.raises(RequestError, match=r"prompt could not be encoded .*ValueError: of another"):
        sdxl.encode(prompts, prompt=LONG)
    hook.remove()

    assert sdxl.encode(prompts, prompt=LONG)["prompt_embeds"].shape[1] == 154


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_the_device_could_not_do_is_not_the_caller_s_fault(sdxl, kind):
    def fail(*_: object) -> None:
        raise kind("of memory, or of the card")

    hook = sdxl.pipeline.text_encoder_2.register_forward_hook(fail)
    with pytest.raises(kind, match="of memory"):
        sdxl.encode(prompt=LONG)
    hook.remove()
