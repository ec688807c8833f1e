"""Several models from one server, and many requests at once: each gets the image it would have got alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.s3 import EmbeddedS3
from demo.small_sdxl import write_small_sdxl
from images.encode import read_metadata
from images.provenance import Provenance
from tests.e2e.conftest import MODEL, Deployment, deploy, fetch, image_urls
from tests.support.cog_server import CogServer
from weights import plan_publication, publish

OTHER = "demo/other"
AT_ONCE = 8


@pytest.fixture(scope="module")
def two_models(
    s3: EmbeddedS3, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Deployment:
    deployed = deploy(s3, small_sdxl)
    add_model(deployed, write_small_sdxl(tmp_path_factory.mktemp("other"), seed=1), OTHER)
    return deployed


def add_model(deployment: Deployment, folder: Path, name: str) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").unlink()
    publish(plan_publication(folder, deployment.bucket(deployment.models), name, recipe))


@pytest.fixture(scope="module")
def both(two_models: Deployment) -> Iterator[CogServer]:
    environment = two_models.environment(MODEL_PATH=f"{MODEL},{OTHER}")
    with CogServer(environment, concurrency=AT_ONCE) as running:
        assert running.health()["status"] == "READY", running.tail()
        yield running


def picture(server: CogServer, **given: object) -> np.ndarray:
    data = {"prompt": "a small red boat", "seed": 3, **given}
    (url,) = image_urls(server.predict(data))
    with Image.open(io.BytesIO(fetch(url))) as image:
        return np.asarray(image).astype(int)


def test_the_model_asked_for_makes_the_image_and_its_file_says_so(both: CogServer) -> None:
    first, second = picture(both), picture(both, model=OTHER)

    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(picture(both, model=MODEL), first)
    for model in (MODEL, OTHER):
        answer = both.predict({"prompt": "a cat", "model": model})
        (url,) = image_urls(answer)
        provenance = Provenance.from_text(read_metadata(fetch(url)))
        assert provenance.model == model
        assert provenance.version == answer.body["metrics"]["model_version"]


def test_a_model_that_is_not_there_is_refused_with_those_that_are(both: CogServer) -> None:
    answer = both.predict({"prompt": "a cat", "model": "demo/third"})

    assert answer.body["status"] == "failed"
    expected = f"model is 'demo/third'; this server has '{MODEL}', '{OTHER}'."
    assert answer.body["error"].endswith(expected)


def test_requests_at_once_for_both_models_get_the_images_they_get_alone(both: CogServer) -> None:
    wanted = [
        {"seed": seed, "model": model, "prompt": f"boat {seed}", "aspect_ratio": ratio}
        for seed, ratio in ((1, "1:1"), (2, "16:9"), (3, "1:1"), (4, "1:1"))
        for model in (MODEL, OTHER)
    ]
    alone = [picture(both, **given) for given in wanted]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = list(pool.map(lambda given: picture(both, **given), wanted))

    for mine, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_a_model_of_another_build_fails_the_start_with_what_to_do(
    two_models: Deployment, tmp_path: Path
) -> None:
    add_model(two_models, write_small_sdxl(tmp_path / "wide", width=2), "demo/wide")

    with CogServer(two_models.environment(MODEL_PATH=f"{MODEL},demo/wide")) as failing:
        health = failing.health()

    assert health["status"] == "SETUP_FAILED"
    assert "demo/wide cannot share a card with demo/small-sdxl" in health["setup"]["logs"]
