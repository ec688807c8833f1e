"""A generated schema in the hands of the real Cog server, with a runner that only echoes.

Every line here was seen with Cog 0.23.1; a new Cog that behaves differently shows up here first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from scripts import generate_schema
from tests.support.cog_server import CogServer

ECHO = """
from cog import BaseRunner, Input


class Runner(BaseRunner):
    async def run(
        self,
        prompt: str = Input(description="What to echo", min_length=1, max_length=20),
        size: str = Input(default="1:1", choices=["1:1", "16:9"]),
        count: int = Input(default=1, ge=1, le=4),
        scale: float = Input(default=3.5, ge=0, le=20),
        seed: int | None = Input(default=None, ge=0, le=9223372036854775807),
    ) -> list[str]:
        return [repr((prompt, size, count, scale, seed))]
"""


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "predict.py").write_text(ECHO)
    assert generate_schema.main(["--root", str(folder)]) == 0
    # A slot is given back a moment after its answer went out, so with one slot the next request can
    # meet a 409. These tests send one request at a time and never wait for a slot.
    with CogServer({}, cwd=folder, concurrency=8) as server:
        yield server


def test_the_server_serves_the_generated_document(echo: CogServer) -> None:
    written = json.loads((echo.cwd / generate_schema.SCHEMA_PATH).read_text(encoding="utf-8"))

    assert echo.request("GET", "/openapi.json").body == written


def test_a_good_request_runs_with_the_defaults_of_the_signature(echo: CogServer) -> None:
    response = echo.predict({"prompt": "a"})

    assert response.status == 200
    assert response.body["output"] == ["('a', '1:1', 1, 3.5, None)"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": ""}, "shorter than 1"),
        ({"prompt": "a" * 21}, "longer than 20"),
        ({"size": "2:1"}, "is not one of"),
        ({"count": 0}, "less than the minimum of 1"),
        ({"count": 99}, "greater than the maximum of 4"),
        ({"count": "3"}, "not of type"),
        ({"count": True}, "not of type"),
        ({"scale": 20.5}, "greater than the maximum of 20"),
        ({"seed": -1}, "less than the minimum of 0"),
        ({"seed": 2**65}, "greater than the maximum"),
        # JSON Schema knows no `nullable`: an optional input is left out, not sent as null.
        ({"seed": None}, "null is not of type"),
    ],
)
def test_a_bad_value_is_a_422_that_names_the_input(
    echo: CogServer, bad: dict[str, Any], message: str
) -> None:
    response = echo.predict({"prompt": "a", **bad})

    assert response.status == 422
    [detail] = response.body["detail"]
    assert detail["loc"] == ["body", "input", *bad]
    assert message in detail["msg"]


def test_a_missing_input_is_a_422_that_names_it(echo: CogServer) -> None:
    response = echo.predict({"size": "1:1"})

    assert response.status == 422
    assert response.body["detail"][0]["loc"] == ["body", "input", "prompt"]
    assert response.body["detail"][0]["msg"] == "Field required"


def test_an_unknown_input_is_dropped_before_validation_and_named_in_the_log(
    echo: CogServer,
) -> None:
    """No schema can change this: the server strips what `properties` does not list first."""
    response = echo.predict({"prompt": "a", "stepz": 3}, id="with-an-unknown-input")

    assert response.status == 200
    echo.wait_for_log("Stripped unknown input fields")
    [line] = [line for line in echo.logs.splitlines() if "Stripped unknown" in line]
    assert "stepz" in line
    assert "with-an-unknown-input" in line


def test_whole_numbers_may_arrive_in_the_other_numeric_type(echo: CogServer) -> None:
    """JSON has one kind of number, so a runner must not rely on int and float as annotated."""
    response = echo.predict({"prompt": "a", "count": 2.0, "scale": 3})

    assert response.body["output"] == ["('a', '1:1', 2.0, 3, None)"]


def test_a_maximum_of_63_bits_lets_two_to_the_63_through(echo: CogServer) -> None:
    """Cog keeps bounds as 64-bit floats, so the runner has to refuse this one value itself."""
    assert echo.predict({"prompt": "a", "seed": 2**63}).status == 200
