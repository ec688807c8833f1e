"""The notation for weights: what it says, that compel says the same, and how everything else is refused."""

from contextlib import suppress

import pytest
from compel.prompt_parser import FlattenedPrompt, PromptParser

from diffusion.errors import RequestError
from diffusion.weighting import MAX_DEPTH, MAX_LOWERED, Fragment, read_weights


def read(prompt: str) -> list[tuple[str, float]]:
    return [(found.text, round(found.weight, 6)) for found in read_weights("prompt", prompt)]


def words(fragments: list[tuple[str, float]]) -> list[tuple[list[str], float]]:
    """Blanks, also around commas, are nothing to a tokenizer."""
    return [(text.replace(",", " , ").split(), weight) for text, weight in fragments]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red fox, night", [("a red fox, night", 1.0)]),
        ("a (red fox)1.3 at night", [("a", 1.0), ("red fox", 1.3), ("at night", 1.0)]),
        ("a red++ fox", [("a", 1.0), ("red", 1.21), ("fox", 1.0)]),
        ("a red-- fox", [("a", 1.0), ("red", 0.81), ("fox", 1.0)]),
        ("(red fox)+ (snow)-", [("red fox", 1.1), ("snow", 0.9)]),
        ("((red)1.2 fox)1.5", [("red", 1.8), ("fox", 1.5)]),
        ("(a (b)0.5 c)2", [("a", 2.0), ("b", 1.0), ("c", 2.0)]),
        ("(snow)0 fox", [("snow", 0.0), ("fox", 1.0)]),
        ("a red+, wet fox-", [("a", 1.0), ("red", 1.1), (", wet", 1.0), ("fox", 0.9)]),
        ("a (fox)1.5.", [("a", 1.0), ("fox", 1.5), (".", 1.0)]),
        ("猫 (赤い)1.3 🙂+", [("猫", 1.0), ("赤い", 1.3), ("🙂", 1.1)]),
        ("(red)1.2 (fox)1.2", [("red fox", 1.2)]),
    ],
)
def test_weights_are_what_is_written(prompt, expected):
    assert words(read(prompt)) == words(expected)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox, night",
        "a (red fox)1.3 at night",
        "a red++ fox, wet--",
        "(red fox)+ and ((red)1.2 fox)1.5 (snow, cold)0.5",
        "f/1.8, 35 mm... what?! a-b - c -- d",
        "a well-known (1920) fox",
        r"a \(plain\) fox",
        "(red)0 fox",
        "猫 (赤い)1.3 🙂++",
        "first line\n(second)1.5 line",
    ],
)
def test_compel_s_own_parser_reads_the_same(prompt):
    (theirs,) = PromptParser().parse_conjunction(prompt).prompts

    assert isinstance(theirs, FlattenedPrompt)
    expected = [(found.text, round(found.weight, 6)) for found in theirs.children]
    assert words(read(prompt)) == words(expected)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (r"C\+\+ and \(1920\)", "C++ and (1920)"),
        (r"a fox \- a red one\-", "a fox - a red one-"),
        (r"back\\ slash\n", r"back\ slash\n"),
        ('a sign that says "OPEN"', 'a sign that says "OPEN"'),
        ("a - b -- c + d", "a - b -- c + d"),
        ("well-known e-mail 1920-1930", "well-known e-mail 1920-1930"),
        ("3.5 mm, f/1.8; at 16:9!", "3.5 mm, f/1.8; at 16:9!"),
    ],
)
def test_what_has_no_weight_stays_as_it_is(prompt, text):
    assert read_weights("prompt", prompt) == (Fragment(text),)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red fox", r"a parenthesis that is never closed, at character 3: '\(red fox'"),
        ("a red) fox", r"a parenthesis that was never opened, at character 6: '\) fox'"),
        ("((((", "never closed, at character 4"),
        ("a (red fox:1.3)", r"a weight inside its parentheses, at character 3"),
        ("(red)-0.5", "a weight without a space after it"),
        ("(red)1.5fox", "a weight without a space after it"),
        ("(red)1.2.3", "a weight that is no number"),
        ("red+-", r"\+ and - in one weight"),
        ('a "red fox"1.3', "a weight after a quotation mark"),
        ('a "red fox"++', "a weight after a quotation mark"),
        ("a cat.swap(dog)", r"an operator that is not supported here, at character 6: '.swap"),
        ('("a", "b").blend(0.7, 0.3)', "an operator that is not supported"),
        ('("a", "b").and() and more', "an operator that is not supported"),
        ("withLora(hat, 0.5) fox", "an operator that is not supported"),
        ("()", "no words in its parentheses"),
        ("(red)99", "gives 'red' the weight 99; weights go from 0 to 5"),
        ("red" + "+" * 9_000, "too large a weight"),
        ("((red)5)5", "weight 25; weights go"),
        ("(" * (MAX_DEPTH + 1) + "red" + ")" * (MAX_DEPTH + 1), "more than 16 deep"),
        ("(red)0.9 fox " * (MAX_LOWERED + 1), "gives 17 parts a weight below 1.*16 are the most"),
    ],
)
def test_what_is_neither_a_weight_nor_text_is_refused_with_its_place(prompt, message):
    with pytest.raises(RequestError, match=f"^negative_prompt .*{message}.*") as refused:
        read_weights("negative_prompt", prompt)

    assert len(str(refused.value)) < 400


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    ["(", ")", "(a)1.1 ", "a ", "+", "\\", "(: ", "a:", '"a" ', "a,", "(a (b (c)1.1)1.1)1.1 "],
)
def test_ten_thousand_characters_come_to_an_end(part):
    with suppress(RequestError):
        read_weights("prompt", part * (10_000 // len(part)))


@pytest.mark.timeout(60)
def test_parentheses_in_parentheses_come_to_an_end():
    # compel's own parser takes four times as long for each: 95 s for eight, years for these.
    deep = "(" * MAX_DEPTH + "red" + ")1.1" * MAX_DEPTH

    assert read(f"a {deep} fox") == [("a", 1.0), ("red", round(1.1**MAX_DEPTH, 6)), ("fox", 1.0)]
