"""A caller who cancels, through the real servers: the work ends, and the next caller is served."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from demo.s3 import Fault
from demo.small_sdxl import write_small_sdxl
from tests.e2e.conftest import deploy, image_urls
from tests.support.cog_server import CogServer

# 200 steps with guidance: far from done when the first image is on its way to the bucket.
LONG = {"prompt": "a fox", "num_inference_steps": 50, "num_outputs": 4}


def test_a_cancelled_request_stops_denoising_and_the_next_one_is_served(s3, tmp_path):
    deployment = deploy(s3, write_small_sdxl(tmp_path / "model", lightning=False))
    identifier = str(uuid.uuid4())
    uploading = Fault(kind="hold", method="PUT", bucket=deployment.images, times=1)

    with CogServer(deployment.environment()) as server, ThreadPoolExecutor(1) as pool:
        with s3.fault(uploading):
            answer = pool.submit(server.predict, LONG, id=identifier)
            s3.wait_for_held_request()

            cancelled = server.request("POST", f"/predictions/{identifier}/cancel")

            assert cancelled.status == 200
            assert answer.result().body["status"] == "canceled"
            server.wait_for_log("Cancelled: seed")
        image_urls(server.predict({"prompt": "a hare", "num_inference_steps": 2}))
