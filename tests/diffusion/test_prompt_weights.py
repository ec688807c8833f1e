"""Prompts with weights: what compel makes of them, and in which direction they move an image."""

import dataclasses

import pytest
import torch
from compel import CompelForSD, CompelForSDXL

from diffusion.denoising import Embeddings
from diffusion.engine import Engine
from diffusion.errors import RequestError
from diffusion.recipe import Recipe
from tests.diffusion.prompting import (
    LONG,
    PROMPT,
    REQUEST,
    Model,
    assert_close,
    assert_equal,
    distance,
    images,
)
from tests.diffusion.support import (
    GUIDED,
    build,
    read_configs,
)
from tests.support import small_families


@pytest.mark.parametrize("prompt", ["a (golden fox)1.4 over the castle-- (night)0.3", LONG])
@pytest.mark.parametrize("negative", ["(ugly)1.3 and blurry-", f"(red)1.2 {LONG}"])
def test_embeddings_are_those_that_compel_makes_alone(small, prompt, negative):
    alone = CompelForSDXL if "tokenizer_2" in small.recipe.architecture.tokenizers else CompelForSD

    ours = small.encode(prompt=prompt, negative_prompt=negative, prompt_weighting=True)

    with torch.inference_mode():
        theirs = alone(small.pipeline)(prompt, negative_prompt=negative)
    # Not the pooled ones: compel alone makes them of the text with its notation.
    named = {"prompt_embeds": theirs.embeds, "negative_prompt_embeds": theirs.negative_embeds}
    assert_close({name: ours[name] for name in named}, named)


@pytest.mark.parametrize("prompt", ["a (golden fox)1.0 over the (castle, night)", PROMPT])
def test_a_weight_of_one_changes_nothing(small, prompt):
    plain = small.encode(negative_prompt="ugly")

    assert_close(
        small.encode(prompt=prompt, negative_prompt="(ugly)1", prompt_weighting=True), plain
    )


def test_a_higher_weight_moves_a_word_and_no_other(small):
    plain = small.encode()["prompt_embeds"]

    more = small.encode(prompt="a golden fox++ over the castle, night", prompt_weighting=True)

    tokenizer = small.pipeline.tokenizer
    before, upto = (len(tokenizer(text).input_ids) - 1 for text in ("a golden", "a golden fox"))
    moved = (more["prompt_embeds"] - plain)[0].abs().sum(dim=-1) > 1e-4
    assert moved.nonzero().flatten().tolist() == list(range(before, upto))


def test_more_weight_moves_further_from_an_empty_prompt(small):
    def at(weight: str) -> Embeddings:
        return small.encode(prompt=f"a golden (fox){weight} in snow", prompt_weighting=True)

    empty = small.stocks("")
    distances = [distance(at(weight), empty) for weight in ("1.0", "1.3", "2")]

    assert distances == sorted(distances)
    assert distances[0] < distances[1]


def test_less_weight_moves_towards_the_prompt_without_the_words(small):
    def at(weight: str) -> Embeddings:
        return small.encode(prompt=f"a golden (fox){weight} in snow", prompt_weighting=True)

    gone = at("0")
    distances = [distance(at(weight), gone) for weight in ("0.2", "0.5", "0.8", "1.0")]

    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1]


def test_weights_in_the_negative_prompt_count_too(small):
    plain = small.encode(negative_prompt="ugly fox")
    weighted = small.encode(negative_prompt="ugly (fox)1.5", prompt_weighting=True)

    assert torch.equal(plain["prompt_embeds"], weighted["prompt_embeds"])
    assert distance(plain, weighted, "negative_prompt_embeds") > 0.01


def test_without_the_switch_the_notation_is_text(small):
    prompt = "a golden (fox)1.5 in snow++"

    assert_equal(small.encode(prompt=prompt), small.stocks(prompt))
    assert distance(small.encode(prompt=prompt), small.encode(prompt=prompt, prompt_weighting=True))


def test_the_pooled_embedding_is_of_the_words_without_the_notation(sdxl):
    weighted = sdxl.encode(
        prompt="a (golden fox)1.4 over the castle, (night)0.6",
        negative_prompt="(ugly)1.5",
        prompt_weighting=True,
    )

    expected = sdxl.stocks(PROMPT, "ugly")
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        torch.testing.assert_close(weighted[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_work_in_half_precision(model, sdxl, dtype):
    half = Model(model, GUIDED, build(model, GUIDED, dtype=dtype))
    call = {
        "prompt": f"(a dragon)0 {LONG} (red)1.4 (snow)0.6 (rain)0",
        "negative_prompt": "(ugly)1.2",
        "prompt_weighting": True,
    }

    mine, full = half.encode(**call), sdxl.encode(**call)

    for name, tensor in mine.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.float(), full[name], rtol=0.1, atol=0.1)


def test_images_differ_by_their_weights(model):
    engine = Engine(build(model, GUIDED), GUIDED)

    plain = images(engine, prompt="a (fox)1.0 at night", prompt_weighting=True)[0]
    more = images(engine, prompt="a (fox)2.0 at night", prompt_weighting=True)[0]

    assert (plain != more).any()


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_broken_notation_is_refused_before_anything_runs(guided, field):
    with pytest.raises(RequestError, match=f"^{field} has a parenthesis that is never closed"):
        guided.generate(
            dataclasses.replace(REQUEST, prompt_weighting=True, **{field: "a (red fox"})
        )


def test_a_negative_prompt_that_is_ignored_may_hold_anything(lightning):
    (image,) = images(lightning, negative_prompt="a (red", prompt_weighting=True)

    assert image.shape == (64, 64, 3)


def test_a_family_without_weights_says_so(tmp_path):
    folder = small_families.write_small_sd3(tmp_path)
    recipe = Recipe.from_configs(read_configs(folder))
    engine = Engine(build(folder, recipe), recipe)

    with pytest.raises(RequestError, match="StableDiffusion3Pipeline knows no weights; send false"):
        engine.generate(dataclasses.replace(REQUEST, prompt_weighting=True))
    assert len(images(engine, prompt="many words " * 10)) == 1
