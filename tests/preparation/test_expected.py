"""What the display announces is what the stages then turn out to be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from demo.small_sdxl import write_small_sdxl
from preparation import Options, Progress, Request, compare, make_plan, prepare, stages_to_come
from preparation.amounts import human_size
from preparation.hub import Hub
from preparation.stages import Upcoming
from tests.preparation.conftest import FINETUNE, Models
from tests.support.hub import LoopbackHub
from tests.support.single_files import write_single_file
from weights import Bucket


def _announced(request: Request) -> dict[str, Upcoming]:
    return {stage.name: stage for stage in stages_to_come(make_plan(request))}


def test_announced_sizes_are_those_of_the_stages(
    loopback_hub: LoopbackHub, hub: Hub, bucket: Bucket, models: Models, tmp_path: Path
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    request = Request(FINETUNE, hub=hub, folder=tmp_path / "prepared")
    plan, out = make_plan(request), io.StringIO()
    announced = [stage for stage in stages_to_come(plan) if stage.size]
    # when
    progress = Progress(out)
    publication = compare(request, prepare(request, plan, progress), bucket, progress)
    # then
    told = [line.split(" in ")[0] for line in out.getvalue().splitlines()]
    assert told == [f"{stage.name}: {human_size(stage.size or 0)}" for stage in announced[:-1]]
    assert announced[-1] == Upcoming("Upload", publication.upload_bytes, at_most=True)
    # and the second time nothing is downloaded
    assert _announced(request)["Download"].size == 0


def test_folder_on_this_disk_is_neither_downloaded_nor_checked(models: Models) -> None:
    announced = _announced(Request(str(models.full), name="me/model"))
    assert [announced[name].size for name in ("Download", "Check", "Convert")] == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_size_of_what_is_cast_is_a_bound_or_nobody_s_guess(models: Models, dtype: str) -> None:
    request = Request(str(models.full), name="me/model", options=Options(dtype=dtype))
    announced = _announced(request)
    assert announced["Convert"].at_most
    assert (announced["Convert"].size or 0) > 1_000_000
    for name in ("Hash", "Upload"):
        assert announced[name].at_most
        assert (announced[name].size is None) == (dtype == "float32")


def test_single_file_is_unpacked_and_what_it_becomes_is_nobodys_guess(tmp_path: Path) -> None:
    base = write_small_sdxl(tmp_path / "base", lightning=False)
    file = write_single_file(base, tmp_path / "one.safetensors")
    announced = _announced(Request(str(file), name="me/model", base=str(base)))
    assert 0.9 < (announced["Unpack"].size or 0) / file.stat().st_size < 1
    assert announced["Convert"].size == 0
    assert announced["Upload"].size is None
