"""The schema that Cog's server validates from: what the generator reads, refuses and keeps fresh.

What the server then does with it is asked of the real server, with a runner of one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import generate_schema
from scripts.generate_schema import generate
from scripts.runner_source import SchemaError

ROOT = Path(__file__).resolve().parents[2]

RUNNER = """
import cog
from cog import BaseRunner, Input

SIZES = ["small", "large"]
DEFAULT_SIZE = "small"
STYLES = {{"plain": 1, "rich": 2}}


class Runner(BaseRunner):
    @cog.concurrent(max=2)
    async def run(
        self,
        {inputs}
    ) -> {output}:
        return []
"""


def schemas_of(*inputs: str, output: str = "list[str]") -> dict[str, Any]:
    source = RUNNER.format(inputs="\n        ".join(f"{line}," for line in inputs), output=output)
    schemas: dict[str, Any] = generate(source)["components"]["schemas"]
    return schemas


def property_of(line: str) -> dict[str, Any]:
    found: dict[str, Any] = schemas_of(line)["Input"]["properties"]["x"]
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x: str", {"type": "string"}),
        ("x: int = 3", {"type": "integer", "default": 3}),
        ("x: float = 2.5", {"type": "number", "default": 2.5}),
        ("x: bool = False", {"type": "boolean", "default": False}),
        ("x: int = Input(default=-1, ge=-1, le=50)", {"default": -1, "minimum": -1, "maximum": 50}),
        ("x: float = Input(ge=0.5, le=20)", {"minimum": 0.5, "maximum": 20}),
        ("x: str = Input(min_length=1, max_length=9)", {"minLength": 1, "maxLength": 9}),
        ("x: str = Input(regex='[a-z]+')", {"pattern": "[a-z]+"}),
        ("x: str = Input(description='What it is')", {"description": "What it is"}),
        ("x: str = Input(deprecated=True)", {"deprecated": True}),
        ("x: int | None", {"type": "integer", "nullable": True}),
        ("x: int | None = Input(default=None)", {"default": None, "nullable": True}),
        ("x: list[int] = Input()", {"type": "array", "items": {"type": "integer"}}),
        ("x: str = Input(default=DEFAULT_SIZE)", {"default": "small"}),
    ],
)
def test_an_input_becomes_the_property_that_cog_build_writes(
    line: str, expected: dict[str, Any]
) -> None:
    found = property_of(line)

    assert {key: found[key] for key in expected} == expected
    assert found["title"] == "X"
    assert found["x-order"] == 0


@pytest.mark.parametrize(
    ("choices", "values"),
    [
        ("['small', 'large']", ["small", "large"]),
        ("SIZES", ["small", "large"]),
        ("list(STYLES.keys())", ["plain", "rich"]),
    ],
)
def test_choices_become_an_enumeration_of_their_own(choices: str, values: list[str]) -> None:
    schemas = schemas_of(f"x: str = Input(choices={choices})")

    assert schemas["Input"]["properties"]["x"]["allOf"] == [{"$ref": "#/components/schemas/x"}]
    assert schemas["x"]["enum"] == values
    assert schemas["x"]["type"] == "string"


def test_an_input_is_required_only_where_it_has_neither_a_default_nor_none() -> None:
    schemas = schemas_of("a: str", "b: int | None", "c: int = None", "d: int = 1")

    # Cog reads `c: int = None` as "no default", not as optional.
    assert schemas["Input"]["required"] == ["a", "c"]
    assert [schemas["Input"]["properties"][name]["x-order"] for name in "abcd"] == [0, 1, 2, 3]


def test_the_output_is_the_return_type() -> None:
    output = schemas_of("x: str", output="list[str]")["Output"]

    assert output == {"title": "Output", "type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize("kind", ["Iterator", "AsyncIterator"])
def test_what_is_yielded_is_an_array_that_says_so(kind: str) -> None:
    output = schemas_of("x: str", output=f"{kind}[str]")["Output"]

    assert output == {
        "title": "Output",
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
    }


@pytest.mark.parametrize(
    "decorator", ["@streaming", "@streaming()", "@cog.streaming", "@cog.streaming()"]
)
def test_a_runner_that_streams_is_marked_for_the_server(decorator: str) -> None:
    source = RUNNER.format(inputs="x: str,", output="AsyncIterator[str]")
    streaming = source.replace("    async def", f"    {decorator}\n    async def")

    assert "x-cog-streaming" not in generate(source)["paths"]["/predictions"]["post"]
    assert generate(streaming)["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x: Path", "opens? whatever file"),
        ("x: Literal['a', 'b']", r"choices=\["),
        ("x: dict[str, int]", "not supported"),
        ("x: int | str", "not supported"),
        ("x = 3", "no type annotation"),
        ("x: str = Input(choices=IMPORTED)", "does not follow imports"),
        ("x: str = Input(choices=[DEFAULT_SIZE])", "only literals inside a list"),
        ("x: str = Input(choices=[])", "at least one"),
        ("x: str = Input(choices=[1, 2])", "1 is not of type string"),
        ("x: str = Input(default='huge', choices=SIZES)", "not a choice"),
        ("x: int = Input(default='many')", "'many' is not of type integer"),
        ("x: int = Input(default=True)", "True is not of type integer"),
        ("x: int = Input(default=len(SIZES))", "cannot be resolved"),
        ("x: int = Input(le=LIMIT)", "plain decimal number"),
        ("x: int = Input(le=1_000)", "underscores"),
        ("x: int = Input(le=2**63)", "plain decimal number"),
        ("x: str = Input(description='one ' 'two')", "one string literal"),
        (r"x: str = Input(description='a\nb')", "one string literal"),
        ("x: str = Input(description=f'{1}')", "cannot be resolved"),
        ("x: str = Input(default_factory=list)", "default_factory"),
        ("x: str = Input('text')", "literal or as Input"),
        ("x: str = cog.Input(description='text')", "literal or as Input"),
        ("*, x: str", r"no \*"),
        ("**x", r"no \*"),
    ],
)
def test_what_cog_cannot_read_is_refused_with_its_place_and_name(line: str, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason) as refused:
        property_of(line)

    assert str(refused.value).startswith("predict.py:")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class Other: ...", "no class Runner"),
        ("class Runner: ...", r"no method run\(\)"),
        ("class Runner:\n    def run(self, x: str): ...", "no return type"),
        ("class Runner:\n    def run(self) -> str | None: ...", "no optional outputs"),
        ("class Runner:\n    def run(self) -> Iterator[list[str]]: ...", "single values"),
        (
            "class Runner:\n    @streaming\n    def run(self) -> list[str]: ...",
            "return an iterator",
        ),
        ("class Runner(", "not valid Python"),
    ],
)
def test_a_runner_that_is_missing_or_unfinished_is_refused(source: str, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        generate(source)


def test_the_tracked_schema_is_what_predict_py_says() -> None:
    tracked = json.loads((ROOT / generate_schema.SCHEMA_PATH).read_text(encoding="utf-8"))
    runner = (ROOT / "predict.py").read_text(encoding="utf-8")

    assert generate_schema.same_schema(tracked, generate(runner)), "stale: run `make schema`"


def test_check_fails_on_a_stale_schema_and_writing_makes_it_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = tmp_path / "predict.py"
    predict.write_text(RUNNER.format(inputs="x: int = 1,", output="str"))
    root = ["--root", str(tmp_path)]
    assert generate_schema.main([*root, "--check"]) == 1
    assert generate_schema.main(root) == 0
    assert generate_schema.main([*root, "--check"]) == 0

    predict.write_text(RUNNER.format(inputs="x: int = 2,", output="str"))

    assert generate_schema.main([*root, "--check"]) == 1
    assert "make schema" in capsys.readouterr().err


def test_nothing_is_written_when_predict_py_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predict.py").write_text(RUNNER.format(inputs="x: Path,", output="str"))

    assert generate_schema.main(["--root", str(tmp_path)]) == 2

    assert not (tmp_path / ".cog").exists()
    assert "predict.py:14: input 'x'" in capsys.readouterr().err
