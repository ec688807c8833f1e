"""Memory on the whole way from the bucket to the pipeline: the model, and no second copy of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo.small_sdxl import write_small_sdxl
from tests.support.cog_server import REPOSITORY
from weights import Bucket, plan_publication, publish

MIB = 2**20

# A child, so that the peak is of nothing but this: what predict.py does between the environment and the engine.
CHILD = """
import json
import torch
from diffusion.build import build_pipeline
from diffusion.recipe import SDXL, Recipe
from settings import load_runner_settings
from weights import Bucket, open_model

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

settings = load_runner_settings()
before = status("VmRSS")
with open_model(Bucket(settings, settings.model_bucket), settings.model_path) as stream:
    pipeline = build_pipeline(
        stream.configs(),
        stream.tensors(),
        Recipe.model_validate(stream.recipe),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
peak = status("VmHWM")
model = sum(p.nbytes for part in SDXL.modules for p in getattr(pipeline, part).parameters())
print(json.dumps({"model": model, "peak": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_from_the_bucket_takes_the_model_and_at_most_512_mib(
    deployment, new_bucket, tmp_path: Path
):
    folder = write_small_sdxl(tmp_path / "wide", width=9)
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").unlink()
    bucket: Bucket = deployment.bucket(new_bucket())
    publish(plan_publication(folder, bucket, "wide", recipe))

    environment = deployment.environment(MODEL_BUCKET_NAME=bucket.name, MODEL_PATH="wide")
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", **environment, **deployment.s3.environment()},
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    print(f"model {measured['model'] / MIB:.0f} MiB, peak {measured['peak'] / MIB:.0f} MiB")
    # Large enough to tell a second copy.
    assert measured["model"] > 600 * MIB
    assert measured["model"] <= measured["peak"] <= measured["model"] + 512 * MIB
