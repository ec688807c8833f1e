"""What a caller can get wrong: each gets a clear error, and the next caller is served."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import TUTORIAL_INPUT, image_urls


@pytest.fixture(autouse=True)
def still_serving(server):
    """Whatever the test sent, the server goes on."""
    yield
    assert server.health()["status"] == "READY"
    image_urls(server.predict(TUTORIAL_INPUT))


def refusal(response) -> str:
    """The one line a caller reads, wherever Cog puts it."""
    if response.status == 422:
        return "; ".join(
            f"{detail['loc'][-1]}: {detail['msg']}" for detail in response.body["detail"]
        )
    assert response.status == 200
    assert response.body["status"] == "failed"
    assert "Traceback" not in response.body["error"]
    error: str = response.body["error"]
    return error


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"aspect_ratio": "7:1"}, 422, ("aspect_ratio", '"7:1" is not one of', '"16:9"')),
        ({"num_inference_steps": 51}, 422, ("num_inference_steps", "maximum of 50")),
        ({"num_inference_steps": 5}, 200, ("num_inference_steps is 5", "distilled for 4")),
        ({"num_outputs": 0}, 422, ("num_outputs", "minimum of 1")),
        ({"num_outputs": 99}, 422, ("num_outputs", "maximum of 4")),
        ({"prompt": ""}, 200, ("prompt is empty",)),
        ({"prompt": " \n\t"}, 200, ("prompt is empty",)),
        ({"prompt": 7}, 422, ("prompt", "string")),
        ({"output_format": "gif"}, 422, ("output_format", '"gif" is not one of')),
        ({"output_quality": 101}, 422, ("output_quality", "maximum of 100")),
        ({"seed": -1}, 422, ("seed", "minimum of 0")),
        ({"seed": 2**63}, 200, ("seed", str(2**63 - 1))),
        ({"guidance_scale": -1}, 422, ("guidance_scale", "minimum of 0")),
        ({"seed": None}, 422, ("seed", "null")),
        ({"prompt": "nothing\0ness"}, 200, ("prompt", "NUL")),
        ({"prompt_weighting": "yes"}, 422, ("prompt_weighting", "boolean")),
        (
            {"prompt": "a (red fox", "prompt_weighting": True},
            200,
            ("prompt has a parenthesis that is never closed, at character 3", "(red fox)1.3"),
        ),
    ],
)
def test_a_wrong_input_is_refused_by_name(server, wrong, status, words):
    response = server.predict(TUTORIAL_INPUT | wrong)
    assert response.status == status, response
    for word in words:
        assert word in refusal(response)


def test_a_missing_prompt_is_refused_by_name(server):
    response = server.predict({})
    assert response.status == 422
    assert "prompt" in refusal(response)


def test_a_ten_megabyte_prompt_is_refused_in_a_short_answer(server):
    response = server.predict(TUTORIAL_INPUT | {"prompt": "x" * 10_000_000})
    assert "10,000,000 characters" in refusal(response)
    assert len(str(response.body)) < 2000


def test_a_prompt_with_any_characters_is_served(server):
    image_urls(server.predict(TUTORIAL_INPUT | {"prompt": "naïve 🦊 \u202e \n ünïcode" * 50}))


def test_an_unknown_input_is_named_in_the_servers_log(server):
    # Cog 0.23 drops it before the schema or the Runner can see it, whatever either says; only its log can tell.
    image_urls(server.predict(TUTORIAL_INPUT | {"unknown_input": 1}, id="has-an-unknown-input"))
    server.wait_for_log("Stripped unknown input fields")
    assert any(
        "unknown_input" in line and "has-an-unknown-input" in line
        for line in server.logs.splitlines()
    )


def test_a_whole_number_with_a_decimal_point_is_served(server):
    image_urls(server.predict(TUTORIAL_INPUT | {"num_inference_steps": 4.0, "num_outputs": 1.0}))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"input": 3}', b'{"input": []}'])
def test_what_is_no_request_is_refused(server, body):
    response = server.request("POST", "/predictions", body)
    assert 400 <= response.status < 500
