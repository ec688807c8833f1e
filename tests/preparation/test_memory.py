"""Memory while preparing: one component at a time where it is merged into, and one shard of it where it is not.

What counts is what only this process can give back: anonymous and shared memory. Pages of a mapped file that were read
are the kernel's to drop whenever it needs them, as its file cache is. Counting them would measure how much memory the
machine had to spare.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from demo.small_sdxl import write_small_sdxl
from preparation.convert import SHARD_LIMIT
from tests.support.single_files import write_single_file

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
GIB = 2**30
LOOK_SECONDS = (
    0.005  # between two looks at the child's memory: a GB takes it a hundred times as long to fill
)

# A child, so that the peak is of nothing but this: what scripts/prepare_model.py does before it publishes.
CHILD = """
import sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import lora_base, peft
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from diffusers.loaders import single_file_model, single_file_utils
import diffusion.components, diffusion.landing, preparation.fuse, safetensors.torch
from preparation import LoraName, Options, Progress, Request, make_plan, prepare

source, destination, lora, dtype, shard_size, base = sys.argv[1:]
options = Options(
    loras=(LoraName.parse(lora),) if lora else (),
    dtype=dtype or None,
    max_shard_size=int(shard_size),
)
request = Request(
    source, name="me/large", folder=Path(destination), options=options, base=base or None
)
torch.zeros(8).fill_(0.5)
print("imported", flush=True)
sys.stdin.readline()
prepare(request, make_plan(request), Progress())
"""


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


@dataclass(frozen=True)
class Large:
    """A model with two components of more than 1 GiB each, and a LoRA for every matrix of these."""

    folder: Path
    lora: Path
    components: Mapping[str, int]  # bytes of each, as the files hold them


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    root = tmp_path_factory.mktemp("large")
    folder = write_small_sdxl(root / "model", lightning=False)
    shapes: dict[str, Mapping[str, list[int]]] = {}
    with init_empty_weights():
        config = json.loads((folder / "unet/config.json").read_text())
        channels = [16 * count for count in config["block_out_channels"]]
        config |= {"block_out_channels": channels}
        unet = UNet2DConditionModel.from_config(config)
        shapes["unet"] = write_zeros(folder / "unet", unet, config)
        config = json.loads((folder / "text_encoder_2/config.json").read_text())
        # As wide as SDXL's, with half of its layers.
        config |= {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 16}
        encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
        shapes["text_encoder_2"] = write_zeros(folder / "text_encoder_2", encoder, config)
    files = {file.parent.name: file.stat().st_size for file in folder.rglob("*.safetensors")}
    return Large(folder, write_lora(root / "lora.safetensors", shapes), files)


def write_zeros(folder: Path, module: Any, config: dict[str, Any]) -> Mapping[str, list[int]]:
    """The module's file in float32, sparse, so that it takes no disk: a header, and a length. Returns its shapes."""
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (file,) = folder.glob("*.safetensors")
    with file.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        writer.truncate(8 + len(text) + end)
    return shapes


def write_lora(file: Path, shapes: Mapping[str, Mapping[str, list[int]]]) -> Path:
    """One that changes every matrix and every convolution, so that what is merged is in memory whole."""
    lora: dict[str, torch.Tensor] = {}
    for component, tensors in shapes.items():
        for name, (rows, *rest) in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or not rest or "embed" in module or module == "text_projection":
                continue
            lora[f"{component}.{module}.lora_A.weight"] = torch.zeros(1, *rest)
            lora[f"{component}.{module}.lora_B.weight"] = torch.zeros(rows, 1, *[1] * len(rest[1:]))
    save_file(lora, file, metadata={"format": "pt"})
    return file


def own_memory(pid: int) -> int:
    """Bytes that only the process can give back; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024


def taken_by_preparing(
    large: Large,
    destination: Path,
    *,
    single_file: Path | None = None,
    lora: bool = False,
    dtype: str = "",
    shard_size: int,
) -> int:
    """The peak of the child's own memory, less what its imports take."""
    source, base = (single_file, large.folder) if single_file else (large.folder, "")
    arguments = [source, destination, large.lora if lora else "", dtype, shard_size, base]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        child.stdout.readline()
        before = peak = own_memory(child.pid)
        child.stdin.write("go on\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, own_memory(child.pid))
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_SECONDS)
        errors = child.stderr.read()
    assert child.returncode == 0, errors
    assert before
    print(f"peak {(peak - before) / MIB:.0f} MiB")
    return peak - before


@pytest.mark.slow
@linux_only
def test_merging_and_casting_takes_the_largest_component_and_at_most_1_gib(
    large: Large, tmp_path: Path
) -> None:
    largest = max(large.components.values())
    allowed = largest + GIB
    # Or neither would all components at once be too much, nor two copies of one, nor one and a whole shard of it.
    assert sum(large.components.values()) > allowed + 128 * MIB
    assert 2 * largest > allowed + 128 * MIB
    assert largest / 2 > SHARD_LIMIT

    taken = taken_by_preparing(large, tmp_path, lora=True, dtype="float16", shard_size=SHARD_LIMIT)

    assert taken <= allowed


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize(
    ("dtype", "shard_size"),
    [("bfloat16", 200_000_000), ("", 200_000_000)],
)
def test_casting_and_splitting_takes_one_shard_and_at_most_256_mib(
    large: Large, tmp_path: Path, dtype: str, shard_size: int
) -> None:
    assert max(large.components.values()) > 2 * shard_size

    taken = taken_by_preparing(large, tmp_path, dtype=dtype, shard_size=shard_size)

    assert taken <= shard_size + 256 * MIB


@pytest.mark.slow
@linux_only
def test_taking_a_single_file_apart_takes_no_more_than_the_largest_component_and_256_mib(
    large: Large, tmp_path: Path
) -> None:
    file = write_single_file(large.folder, tmp_path / "large.safetensors")
    largest = max(large.components.values())
    assert sum(large.components.values()) > largest + GIB

    taken = taken_by_preparing(
        large, tmp_path / "prepared", single_file=file, dtype="float16", shard_size=SHARD_LIMIT
    )

    assert taken <= largest + 256 * MIB
