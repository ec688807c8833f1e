"""Prompts of any length, with and without weights: what stock makes of them, how often, and what is kept."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import CompelForSD, CompelForSDXL

from demo.small_sdxl import write_small_sdxl
from diffusion.denoising import Embeddings
from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import RequestError
from diffusion.prompts import Prompts
from diffusion.recipe import Recipe
from diffusion.refresh import stage
from diffusion.request import Plan
from tests.diffusion.support import (
    GUIDED,
    build,
    edited,
    generators,
    pixels,
    read_configs,
    read_tensors,
    stock_pipeline,
)
from tests.support import small_families

PROMPT = "a golden fox over the castle, night"
LONG = "a golden fox over the castle, " * 14 + "a red dragon"
REQUEST = GenerationRequest(prompt=PROMPT, width=64, height=64, steps=2, seed=3)
PLAN = Plan(PROMPT, None, 64, 64, steps=2, guidance_scale=5.0, seeds=(3,))
WRITERS = {"SDXL": write_small_sdxl, "SD 1": small_families.write_small_sd1}


@dataclasses.dataclass(frozen=True)
class Model:
    """One family's small model: its files, and the pipeline built from them."""

    folder: Path
    recipe: Recipe
    pipeline: Any

    def prompts(self, **options: Any) -> Prompts:
        architecture = self.recipe.architecture
        return Prompts(self.pipeline, architecture, torch.device("cpu"), **options)

    def encode(self, prompts: Prompts | None = None, **changes: Any) -> Embeddings:
        with torch.inference_mode():
            return (prompts or self.prompts()).encode(dataclasses.replace(PLAN, **changes))

    def stocks(self, prompt: str, negative: str | None = None, guided: bool = True) -> Embeddings:
        names = self.recipe.architecture.embeddings
        with torch.inference_mode():
            encoded = self.pipeline.encode_prompt(
                prompt=prompt,
                negative_prompt=negative,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
        return dict(zip(names, encoded, strict=True))

    @contextmanager
    def runs(self) -> Iterator[list[str]]:
        """The text encoders that ran, one name a run."""
        seen: list[str] = []
        encoders = [found.encoder for found in self.recipe.architecture.tokenizers.values()]
        hooks = [
            getattr(self.pipeline, name).register_forward_hook(
                lambda *_, name=name: seen.append(name)
            )
            for name in encoders
        ]
        yield seen
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module", params=WRITERS, ids=WRITERS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = WRITERS[request.param](tmp_path_factory.mktemp("model"))
    recipe = Recipe.from_configs(read_configs(folder))
    return Model(folder, recipe, build(folder, recipe))


@pytest.fixture(scope="module")
def sdxl(model: Path) -> Model:
    return Model(model, GUIDED, build(model, GUIDED))


def assert_equal(mine: Embeddings, theirs: Embeddings) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        other = theirs[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or torch.equal(tensor, other), name


def assert_close(mine: Embeddings, theirs: Embeddings) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def distance(one: Embeddings, other: Embeddings, name: str = "prompt_embeds") -> float:
    return float((one[name] - other[name]).norm())


def images(engine: Engine, **changes: Any) -> list[np.ndarray]:
    request = dataclasses.replace(REQUEST, **changes)
    return [pixels(made.image) for made in engine.generate(request)]


# Plain prompts


@pytest.mark.parametrize("prompt", [PROMPT, "C++ (1920) well- (red:1.3", "red " * 75])
@pytest.mark.parametrize("negative", [None, "blurry, (ugly)"])
@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_a_plain_prompt_is_to_the_bit_what_stock_makes_of_it(
    small, prompt, negative, guidance_scale
):
    ours = small.encode(prompt=prompt, negative_prompt=negative, guidance_scale=guidance_scale)

    assert_equal(ours, small.stocks(prompt, negative, guided=guidance_scale > 1))


def test_the_pixels_of_a_kept_prompt_are_those_of_a_fresh_one_and_stock_s(model):
    engine = Engine(build(model, GUIDED), GUIDED)
    call = {"negative_prompt": "blurry", "guidance_scale": 5.0}

    first, second = (images(engine, width=96, height=96, **call)[0] for _ in range(2))

    (generator,) = generators(3)
    stock = stock_pipeline(model)(
        prompt=PROMPT, width=96, height=96, num_inference_steps=2, generator=generator, **call
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, pixels(stock.images[0]))


# What is kept


def test_the_text_encoders_run_once_for_four_images_and_never_again_for_their_prompt(sdxl):
    engine = Engine(sdxl.pipeline, GUIDED)

    with sdxl.runs() as runs:
        assert len(images(engine, num_outputs=4)) == 4
    assert sorted(runs) == ["text_encoder", "text_encoder_2"]

    with sdxl.runs() as runs:
        images(engine, seed=9, width=96)
    assert runs == []


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "red"},
        {"negative_prompt": "red"},
        {"guidance_scale": 0.0},
        {"prompt_weighting": True},
    ],
)
def test_whatever_the_embeddings_depend_on_has_them_made_anew(sdxl, other):
    prompts = sdxl.prompts()
    sdxl.encode(prompts)

    with sdxl.runs() as runs:
        sdxl.encode(prompts, **other)
        again = list(runs)
        sdxl.encode(prompts, **other)
        sdxl.encode(prompts)

    assert again
    assert runs == again


def test_what_the_embeddings_do_not_depend_on_does_not(sdxl):
    prompts = sdxl.prompts()
    sdxl.encode(prompts)

    with sdxl.runs() as runs:
        sdxl.encode(prompts, width=96, steps=4, seeds=(7, 8), guidance_scale=9.0)

    assert runs == []


def test_what_was_asked_for_least_recently_makes_room(sdxl):
    size = sum(tensor.nbytes for tensor in sdxl.encode().values())
    prompts = sdxl.prompts(max_bytes=2 * size)
    for prompt in ("red", "green", "red", "blue"):
        sdxl.encode(prompts, prompt=prompt)

    assert prompts.kept_bytes == 2 * size
    with sdxl.runs() as runs:
        sdxl.encode(prompts, prompt="red")
        sdxl.encode(prompts, prompt="blue")
        assert runs == []
        sdxl.encode(prompts, prompt="green")
        assert len(runs) == 2
    assert prompts.kept_bytes == 2 * size


def test_what_is_larger_than_all_the_room_makes_none(sdxl):
    size = sum(tensor.nbytes for tensor in sdxl.encode().values())
    prompts = sdxl.prompts(max_bytes=size)
    sdxl.encode(prompts)

    sdxl.encode(prompts, prompt=LONG)

    with sdxl.runs() as runs:
        sdxl.encode(prompts)
    assert runs == []
    assert prompts.kept_bytes == size


def test_a_version_that_takes_over_finds_nothing_of_the_old_one(model, tmp_path):
    update = write_small_sdxl(tmp_path, seed=1)
    # Both without a name, which tells nothing apart.
    engine, other = (Engine(build(folder, GUIDED), GUIDED) for folder in (model, update))
    images(engine)
    images(engine, prompt=LONG, prompt_weighting=True)
    staged = stage(read_configs(update), read_tensors(update), GUIDED, None)

    engine.replace(staged)

    assert engine._model(None).prompts.kept_bytes == 0
    for asked in ({}, {"prompt": LONG, "prompt_weighting": True}):
        for mine, theirs in zip(images(engine, **asked), images(other, **asked), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_each_of_the_models_that_share_modules_finds_its_own(model, tmp_path):
    other = write_small_sdxl(tmp_path, seed=1)
    engine = Engine(build(model, GUIDED), GUIDED, name="one")
    engine.add_model("two", stage(read_configs(other), read_tensors(other), GUIDED, None))
    alone = {
        "one": images(Engine(build(model, GUIDED), GUIDED)),
        "two": images(Engine(build(other, GUIDED), GUIDED)),
    }

    small = Model(model, GUIDED, engine._model("one").pipeline)
    with small.runs() as runs:
        made = [(name, images(engine, model=name)) for name in ("one", "two", "one", "two")]

    assert sorted(runs) == ["text_encoder", "text_encoder", "text_encoder_2", "text_encoder_2"]
    for name, (image,) in made:
        np.testing.assert_array_equal(image, alone[name][0])


# Weights


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


# Long prompts


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
