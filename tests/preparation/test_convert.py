"""Splitting and casting safetensors, one shard at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from preparation import Progress, Request, UsageError, convert, make_plan
from preparation.assemble import assemble
from tests.preparation.conftest import LIGHTNING, Models
from tests.preparation.repositories import split
from tests.support.hub import LoopbackHub


def _write(folder: Path, files: list[Path], dtype: str | None, limit: int) -> list[int]:
    folder.mkdir()
    tensors = convert.read_headers(files, "the model")
    shards = convert.plan_shards(tensors, dtype, limit)
    moved: list[int] = []
    convert.write_shards(shards, folder, "model", dtype=dtype, label="it", on_bytes=moved.append)
    assert sum(moved) == sum(tensor.size for tensor in tensors)
    return [len(shard) for shard in shards]


def test_shards_hold_every_tensor_once_and_none_is_over_the_limit(
    models: Models, tmp_path: Path
) -> None:
    source = models.half / "unet/diffusion_pytorch_model.safetensors"
    counts = _write(tmp_path / "out", [source], None, 1_000_000)
    assert len(counts) > 3
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(counts):05d}.safetensors"
        for number in range(1, len(counts) + 1)
    ]
    merged: dict[str, torch.Tensor] = {}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for shard in shards:
        tensors = load_file(shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1_000_000
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(
            tensors
        )
        assert not merged.keys() & tensors.keys()
        merged |= tensors
    expected = load_file(source)
    assert merged.keys() == expected.keys()
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_cast_is_the_one_that_torch_does(models: Models, tmp_path: Path) -> None:
    source = models.full / "vae/diffusion_pytorch_model.safetensors"
    _write(tmp_path / "out", [source], "F16", convert.SHARD_LIMIT)
    cast = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in load_file(source).items():
        assert cast[name].equal(tensor.half())


def test_integers_are_not_cast(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(4), "w": torch.ones(2)}, tmp_path / "in.safetensors")
    _write(tmp_path / "out", [tmp_path / "in.safetensors"], "F16", 1000)
    cast = load_file(tmp_path / "out/model.safetensors")
    assert (cast["ids"].dtype, cast["w"].dtype) == (torch.int64, torch.float16)


def test_value_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, 70000.0])}, tmp_path / "in.safetensors")
    with pytest.raises(UsageError, match="tensor w has values too large for float16"):
        _write(tmp_path / "out", [tmp_path / "in.safetensors"], "F16", 1000)


def test_tensor_that_is_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(UsageError, match=r"tensor w is in a\.safetensors and in b\.safetensors"):
        convert.read_headers(files, "the model")


def test_same_input_gives_the_same_bytes(models: Models, tmp_path: Path) -> None:
    source = models.half / "unet/diffusion_pytorch_model.safetensors"
    for name in ("one", "two"):
        _write(tmp_path / name, [source], None, 1_000_000)
    for shard in (tmp_path / "one").iterdir():
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_large_lightning_unet_is_split_and_stock_diffusers_loads_it(
    lightning_hub: LoopbackHub, hub: object, models: Models, tmp_path: Path, quiet: Progress
) -> None:
    plan = make_plan(Request(LIGHTNING, hub=hub))
    folder = tmp_path / "prepared"
    plan = dataclasses.replace(plan, shard_limit=1_000_000)
    assemble(plan, folder, jobs=2, progress=quiet)
    shards = sorted(file.name for file in (folder / "unet").glob("*.safetensors"))
    assert len(shards) > 3
    assert not (folder / "vae/diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    expected = load_file(models.other_half / "unet/diffusion_pytorch_model.safetensors")
    assert all(loaded[name].half().equal(tensor) for name, tensor in expected.items())


def test_folder_whose_shards_are_already_small_is_taken_as_it_is(
    models: Models, own: object, tmp_path: Path, quiet: Progress
) -> None:
    folder = own(models.full)
    names = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    split(folder / "unet/diffusion_pytorch_model.safetensors", names)
    plan = make_plan(Request(str(folder), name="me/model"))
    out = tmp_path / "out"
    plan = dataclasses.replace(plan, shard_limit=9_000_000)
    assemble(plan, out, jobs=2, progress=quiet)
    for name in names:
        assert (out / "unet" / name).read_bytes() == (folder / "unet" / name).read_bytes()
