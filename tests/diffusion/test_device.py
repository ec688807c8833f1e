"""Choosing where to run and in what dtype."""

import os
import subprocess
import sys

import pytest
import torch

from diffusion.device import choose_device, choose_dtype
from diffusion.errors import DeviceError

CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()


def test_the_cpu_runs_in_float32():
    assert choose_device("cpu") == CPU
    assert choose_dtype(CPU, "auto") == torch.float32


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_dtype_that_is_asked_for_is_given(name):
    assert choose_dtype(CPU, name) == getattr(torch, name)


@pytest.mark.parametrize("asked", ["gpu", "mps", "", "cuda:x"])
def test_what_is_no_device_here_is_refused_with_those_there_are(asked):
    with pytest.raises(DeviceError, match="auto, cuda or cpu"):
        choose_device(asked)


def test_what_is_no_dtype_is_refused_with_those_there_are():
    with pytest.raises(DeviceError, match="auto, float16, bfloat16, float32"):
        choose_dtype(CPU, "int8")


def test_without_a_card_auto_is_the_cpu_and_cuda_is_refused():
    # In a child that can see no card, so that this holds on every machine.
    code = """
from diffusion.device import choose_device
from diffusion.errors import DeviceError
assert choose_device("auto").type == "cpu"
for asked in ("cuda", "cuda:1"):
    try:
        choose_device(asked)
    except DeviceError as error:
        assert "finds no CUDA card" in str(error), error
    else:
        raise AssertionError(asked)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA card")
def test_a_card_runs_in_bfloat16_where_it_computes_that_natively():
    device = choose_device("auto")

    assert device.type == "cuda"
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    assert choose_dtype(device) == (torch.bfloat16 if native else torch.float16)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA card")
def test_a_card_beyond_those_there_are_is_refused():
    with pytest.raises(DeviceError, match=r"counted from cuda:0"):
        choose_device(f"cuda:{torch.cuda.device_count()}")
