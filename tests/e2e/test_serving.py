"""The tutorial's promise, through the real servers: a PUT with a prompt gives URLs of images."""

from __future__ import annotations

import io
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from demo.s3 import Fault
from images.encode import read_metadata
from images.provenance import Provenance
from tests.e2e.conftest import MODEL, TUTORIAL_INPUT, fetch, image_urls, version_of


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_tutorials_request_gives_a_picture(server, deployment):
    identifier = str(uuid.uuid4())

    response = server.predict(TUTORIAL_INPUT, id=identifier)

    (url,) = image_urls(response)
    assert identifier in url
    image = Image.open(io.BytesIO(fetch(url)))
    assert image.format == "PNG"
    assert image.size == (256, 256)
    assert np.asarray(image).std() > 10  # neither black nor one colour
    assert "Ignoring guidance_scale 3.5" in response.body["logs"]


def test_the_answer_tells_seed_version_and_timings(server, deployment):
    metrics = server.predict({"prompt": "a lighthouse", "seed": 2**63 - 1}).body["metrics"]
    assert metrics["seed"] == 2**63 - 1
    assert metrics["model_version"] == version_of(deployment)
    for stage in ("wait", "prompt", "denoise", "decode", "encode", "upload"):
        assert metrics["timings"][stage] >= 0


@pytest.mark.parametrize("weighting", [{}, {"prompt_weighting": True}])
def test_an_image_can_be_made_again_from_its_own_file(server, deployment, weighting):
    (url,) = image_urls(
        server.predict({"prompt": "a (fox)1.4 ✨", "aspect_ratio": "3:2", **weighting})
    )
    first = fetch(url)
    made = Provenance.from_text(read_metadata(first))
    assert made.model == MODEL
    assert made.version == version_of(deployment)
    assert f"{made.width}x{made.height}" == "{}x{}".format(*Image.open(io.BytesIO(first)).size)

    (again,) = image_urls(
        server.predict(
            {
                "prompt": made.prompt,
                "seed": made.seed,
                "num_inference_steps": made.steps,
                "aspect_ratio": "3:2",
                "prompt_weighting": made.prompt_weighting,
            }
        )
    )

    assert made.prompt_weighting == bool(weighting)
    np.testing.assert_array_equal(pixels(fetch(again)), pixels(first))


def test_image_k_is_the_image_of_seed_plus_k(server):
    urls = image_urls(server.predict({"prompt": "a fox", "seed": 41, "num_outputs": 3}))
    (alone,) = image_urls(server.predict({"prompt": "a fox", "seed": 43}))
    assert len(set(urls)) == 3
    np.testing.assert_array_equal(pixels(fetch(urls[2])), pixels(fetch(alone)))


@pytest.mark.parametrize(("name", "pillow_name"), [("webp", "WEBP"), ("jpg", "JPEG")])
def test_other_formats_are_what_they_say(server, name, pillow_name):
    (url,) = image_urls(
        server.predict({"prompt": "a fox", "output_format": name, "output_quality": 50})
    )
    assert f".{name}?" in url
    assert Image.open(io.BytesIO(fetch(url))).format == pillow_name


def test_the_same_id_twice_loses_no_image(server):
    identifier = str(uuid.uuid4())
    (first,) = image_urls(server.predict({"prompt": "one"}, id=identifier))
    before = fetch(first)

    (second,) = image_urls(server.predict({"prompt": "two"}, id=identifier))

    assert first.partition("?")[0] != second.partition("?")[0]
    assert fetch(first) == before


def test_two_requests_are_served_side_by_side(server):
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(lambda seed: server.predict({"prompt": "side by side", "seed": seed}), (1, 2))
        )
    urls = [url for answer in answers for url in image_urls(answer)]
    assert len(set(urls)) == 2


def test_a_slow_upload_keeps_nobody_else_from_the_device(server, deployment):
    slow = Fault(kind="hold", method="PUT", bucket=deployment.images, times=1)
    with ThreadPoolExecutor(1) as pool:
        with deployment.s3.fault(slow):
            first = pool.submit(server.predict, {"prompt": "a fox", "num_outputs": 2})
            deployment.s3.wait_for_held_request()

            image_urls(server.predict({"prompt": "a hare"}))

            assert not first.done()
        assert len(image_urls(first.result())) == 2


def test_an_id_that_looks_like_a_path_stays_in_the_images_folder(server, deployment):
    (url,) = image_urls(server.predict({"prompt": "a fox"}, id="..%2F..%2Fescape"))
    assert "/../" not in url
    assert fetch(url)
    keys = [found.key for found in deployment.bucket(deployment.images).list("")]
    assert all(key.split("/")[0].isdigit() for key in keys)


def test_images_are_private_without_the_signature(server):
    (url,) = image_urls(server.predict({"prompt": "a fox"}))
    import urllib.error

    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(url.partition("?")[0])
    assert refused.value.code == 403


def test_the_setup_log_tells_what_was_loaded_and_how_long_it_took(server, deployment):
    server.wait_for_log(f"loading {MODEL} {version_of(deployment)}")
    server.wait_for_log("ready on cpu (float32)")
