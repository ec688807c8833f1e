"""Memory while building: the model, and no second copy of it."""

import json
import subprocess
import sys

import pytest

from tests.diffusion.support import edited, read_configs

MIB = 2**20

# A child, so that the peak is of nothing but this. Tensors come as they come from a bucket, each in memory of its own;
# they are written to, since pages that are only reserved do not count.
CHILD = """
import json, mmap, sys
import torch
from diffusion.build import build_module, build_pipeline
from diffusion.recipe import SDXL, Recipe
from tests.diffusion.support import Tensor

file_dtype, name = sys.argv[1:]
configs = {path: text.encode() for path, text in json.load(sys.stdin).items()}
shapes = [
    (f"{part}/model.safetensors", key, tuple(tensor.shape))
    for part, kind in SDXL.modules.items()
    for key, tensor in build_module(part, kind, configs).state_dict().items()
]

def tensors():
    for path, key, shape in shapes:
        count = torch.Size(shape).numel()
        memory = mmap.mmap(-1, count * file_dtype_size)
        torch.frombuffer(memory, dtype=getattr(torch, file_dtype)).fill_(0.5)
        yield Tensor(path, key, name, shape, memory)
        del memory

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

file_dtype_size = getattr(torch, file_dtype).itemsize
torch.zeros(8).fill_(0.5)
before = status("VmRSS")
pipeline = build_pipeline(
    configs, tensors(), Recipe.from_configs(configs), device=torch.device("cpu"), dtype=torch.float32
)
peak = status("VmHWM")
model = sum(p.nbytes for part in SDXL.modules for p in getattr(pipeline, part).parameters())
print(json.dumps({"model": model, "peak": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("file_dtype", "name"), [("float32", "F32"), ("float16", "F16")])
def test_building_takes_the_model_and_at_most_512_mib(model, file_dtype, name):
    channels = {"block_out_channels": [320, 640, 960], "attention_head_dim": [5, 10, 15]}
    configs = edited(read_configs(model), "unet/config.json", **channels)
    given = json.dumps({path: content.decode() for path, content in configs.items()})

    command = [sys.executable, "-c", CHILD, file_dtype, name]
    run = subprocess.run(
        command, input=given, text=True, capture_output=True, check=False, timeout=240
    )

    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    # Large enough to tell a second copy, even one in half precision.
    assert measured["model"] > 1100 * MIB
    assert measured["model"] <= measured["peak"] <= measured["model"] + 512 * MIB
