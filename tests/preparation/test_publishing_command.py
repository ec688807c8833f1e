"""What the command says and does around a publication: JSON, differences, pruning, going back."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from tests.preparation.conftest import FINETUNE, Models, Ran
from tests.support.hub import LoopbackHub
from weights import Bucket, find_snapshot, read_latest
from weights.provenance import read_provenance
from weights.pull import verify

Command = Callable[..., Ran]
NAME = "me/model"
UNET = "unet/diffusion_pytorch_model.safetensors"


def change(folder: Path) -> None:
    config = folder / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.13}))


def document(ran: Ran, code: int = 0) -> dict[str, Any]:
    assert ran.code == code, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_the_document_tells_all_of_two_publications_and_what_was_pruned(
    command: Command,
    bucket: Bucket,
    models: Models,
    own: Callable[[Path], Path],
    s3: EmbeddedS3,
) -> None:
    folder = own(models.full)
    arguments = (folder, bucket.name, "--name", NAME, "--json")
    # when, for the first time
    first = document(command(*arguments))
    # then
    assert first["previous_version"] is None
    assert first["difference"] is None
    assert {file["state"] for file in first["files"]} == {"uploaded"}
    assert first["uploaded_bytes"] == first["bytes"] == sum(file["size"] for file in first["files"])
    assert first["options"] == {"source": folder.name}
    assert first["tools"]["python"] == platform.python_version()
    assert first["tools"]["torch"] == metadata.version("torch")
    assert first["environment"] == {
        "AWS_ENDPOINT_URL_S3": s3.endpoint_url,
        "AWS_REGION": "auto",
        "MODEL_PATH": NAME,
        "MODEL_BUCKET_NAME": bucket.name,
        "PUBLIC_BUCKET_NAME": "<your image bucket>",
    }
    # when one file has changed
    change(folder)
    second = document(command(*arguments, "--prune", "1"))
    # then
    assert second["previous_version"] == first["version"]
    states = {file["path"]: file["state"] for file in second["files"]}
    assert states["vae/config.json"] == "uploaded"
    assert states[UNET] == "copied"
    assert second["difference"]["since"] == first["version"]
    assert second["difference"]["changed"]["paths"] == ["vae/config.json"]
    assert second["difference"]["added"]["files"] == second["difference"]["removed"]["files"] == 0
    assert second["difference"]["same"]["files"] == len(second["files"]) - 1
    assert [found["version"] for found in second["deleted"]] == [first["version"]]
    assert second["kept"] == [second["version"]]
    assert not list(bucket.list(f"{NAME}/{first['version']}/"))
    assert verify(bucket, find_snapshot(bucket, NAME)).problems == ()
    made = read_provenance(bucket, NAME, second["version"])
    assert made == {"options": second["options"], "tools": second["tools"]}
    # when nothing has changed, a dry run
    third = document(command(*arguments, "--dry-run", "--prune", "1"))
    assert third["unchanged"]
    assert third["dry_run"]
    assert {file["state"] for file in third["files"]} == {"there"}
    assert third["deleted"] == []


def test_a_person_is_told_how_the_version_differs_and_what_was_deleted(
    command: Command, bucket: Bucket, models: Models, own: Callable[[Path], Path]
) -> None:
    folder = own(models.full)
    arguments = (folder, bucket.name, "--name", NAME)
    ran = command(*arguments)
    assert "first version of this model" in ran.out
    first = read_latest(bucket, NAME)
    change(folder)
    assert f"Would delete version {first}" in command(*arguments, "--dry-run", "--prune", "1").out
    assert read_latest(bucket, NAME) == first
    # when
    ran = command(*arguments, "--prune", "1")
    # then
    assert ran.code == 0, ran.err
    assert f"compared with version {first}: 1 changed (" in ran.out
    assert "the same (" in ran.out
    assert f"Deleted version {first}" in ran.out
    assert "1 version of me/model kept." in ran.out


def test_going_back_needs_no_source(
    command: Command, bucket: Bucket, models: Models, own: Callable[[Path], Path]
) -> None:
    folder = own(models.full)
    first = document(command(folder, bucket.name, "--name", NAME, "--json"))["version"]
    change(folder)
    second = document(command(folder, bucket.name, "--name", NAME, "--json"))["version"]
    folder.rename(folder.with_name("gone"))
    # when, with the command line it was published with
    ran = command(folder, bucket.name, "--name", NAME, "--activate", first)
    # then
    assert ran.code == 0, ran.err
    said = f"s3://{bucket.name}/{NAME} now serves version {first} (before: {second})."
    assert ran.out.strip() == said
    assert read_latest(bucket, NAME) == first
    # when, without any source
    found = document(command(bucket.name, "--name", NAME, "--activate", second, "--json"))
    # then
    assert (found["version"], found["previous_version"]) == (second, first)
    assert read_latest(bucket, NAME) == second
    # when it is only tried
    assert command(bucket.name, "--name", NAME, "--activate", first, "--dry-run").code == 0
    assert read_latest(bucket, NAME) == second
    # when there is no such version
    ran = command(bucket.name, "--name", NAME, "--activate", "0" * 32, "--json")
    assert "is not in bucket" in document(ran, 1)["error"]
    assert read_latest(bucket, NAME) == second


def test_the_dry_run_of_a_repo_is_a_document_too(
    loopback_hub: LoopbackHub, command: Command, bucket: Bucket, models: Models
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    found = document(command(FINETUNE, bucket.name, "--dry-run", "--json"))
    assert found["version"] is None
    assert found["source"]["repo"] == FINETUNE
    waiting = [file for file in found["needed_files"] if file["state"] == "to download"]
    assert found["download_bytes"] == sum(file["size"] for file in waiting) > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/no/such/folder", "models", "--name", "a/b"], 2, "There is no folder"),
        (["a/b"], 2, "the following arguments are required: BUCKET"),
        (["a/b", "models", "--prune", "0"], 2, "0 is not between 1 and 256"),
        (["a/b", "models", "--prune", "1", "--activate", "0" * 32], 2, "not allowed with"),
        (["models", "--activate", "0" * 32], 2, "the following arguments are required: BUCKET"),
        (["a/b", "models", "--activate", ""], 2, "'' is not a version's name"),
    ],
)
def test_an_error_is_a_document_with_the_same_code(
    command: Command, arguments: list[str], code: int, message: str
) -> None:
    ran = command(*arguments, "--json")
    assert message in document(ran, code)["error"]
    assert message in ran.err
