"""One request through the Runner in this process, where a test sees what the device does meanwhile.

The pipeline, the engine, the store and the S3 server are the real ones; only Cog's own server is left out.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event

import pytest
from diffusers import StableDiffusionXLPipeline

from demo.s3 import Fault
from diffusion.engine import Engine
from diffusion.errors import NonFiniteError
from images.encode import read_metadata
from images.provenance import Provenance
from images.store import ImageStore
from predict import Runner
from s3 import connect
from settings import load_runner_settings
from tests.diffusion.support import LIGHTNING, build
from tests.e2e.conftest import TUTORIAL_INPUT, Deployment, fetch, version_of

RECIPE = LIGHTNING.model_copy(update={"native_size": 64})
INPUT = TUTORIAL_INPUT | {
    "negative_prompt": "",
    "seed": 7,
    "output_quality": 80,
    "prompt_weighting": False,
    "previews": False,
    "model": None,
}
PATIENCE = 60.0  # seconds, for what would otherwise never come


@pytest.fixture
def pipeline(small_sdxl: Path) -> StableDiffusionXLPipeline:
    return build(small_sdxl, RECIPE)


@pytest.fixture
def runner(
    pipeline: StableDiffusionXLPipeline, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """A Runner as its setup leaves it, around a pipeline that the test can reach."""
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    runner = Runner()
    runner.settings = load_runner_settings()
    runner.store = ImageStore(connect(runner.settings), deployment.images)
    runner.model_version = version_of(deployment)
    runner.engine = Engine(pipeline, RECIPE, batch_size=1)
    return runner


async def answered(runner: Runner, **changes: object) -> list[str]:
    return [url async for url in runner.run(**INPUT | changes)]


def test_the_next_image_is_made_while_the_one_before_is_uploaded(runner, pipeline, deployment):
    decoded: list[None] = []
    both_decoded = Event()

    def count(*_: object) -> None:
        decoded.append(None)
        if len(decoded) == 2:
            both_decoded.set()

    pipeline.vae.decoder.register_forward_hook(count)
    slow = Fault(kind="hold", method="PUT", bucket=deployment.images, key="*-0.png")

    async def answer() -> tuple[bool, list[str]]:
        with deployment.s3.fault(slow):
            request = asyncio.create_task(answered(runner, num_outputs=2))
            await asyncio.to_thread(deployment.s3.wait_for_held_request)
            beside = await asyncio.to_thread(both_decoded.wait, PATIENCE)
        return beside, await request

    beside, urls = asyncio.run(answer())

    assert beside
    seeds = [Provenance.from_text(read_metadata(fetch(url))).seed for url in urls]
    assert seeds == [7, 8]


def test_a_caller_who_leaves_ends_the_denoising(runner, pipeline):
    steps: list[None] = []
    begun, left = Event(), Event()

    def wait_in_the_first_step(*_: object) -> None:
        steps.append(None)
        begun.set()
        assert left.wait(PATIENCE)

    pipeline.unet.register_forward_hook(wait_in_the_first_step)

    async def leave() -> None:
        request = asyncio.create_task(answered(runner, num_outputs=4))
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        request.cancel()  # what Cog does when the caller cancels or hangs up
        with pytest.raises(asyncio.CancelledError):
            await request
        left.set()

    asyncio.run(leave())  # and wait for every thread that it left behind

    assert len(steps) == 1


def test_when_a_later_image_cannot_be_made_the_error_tells_where_those_before_it_are(
    runner, pipeline
):
    decoded: list[None] = []

    def spoil_the_weights_after_two_images(*_: object) -> None:
        decoded.append(None)
        if len(decoded) == 2:
            pipeline.unet.conv_out.bias[0] = float("nan")

    pipeline.vae.decoder.register_forward_hook(spoil_the_weights_after_two_images)

    with pytest.raises(NonFiniteError, match="Denoising seed 9 gave latents with NaN") as failed:
        asyncio.run(answered(runner, num_outputs=4))

    urls = str(failed.value).partition(". The images before it are stored: ")[2].split()
    seeds = [Provenance.from_text(read_metadata(fetch(url))).seed for url in urls]
    assert seeds == [7, 8]


def test_when_the_first_image_cannot_be_made_nothing_is_said_to_be_stored(runner, pipeline):
    pipeline.unet.conv_out.bias[0] = float("nan")

    with pytest.raises(NonFiniteError) as failed:
        asyncio.run(answered(runner, num_outputs=2))

    assert "stored" not in str(failed.value)
