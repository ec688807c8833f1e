"""Repos that cannot be read, and a Hub that cannot be reached: what a person is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preparation import PreparationError, UsageError
from preparation.hub import Hub, is_repo_id
from tests.preparation.conftest import FINETUNE, TOKEN, Models, Prepare
from tests.support.hub import LoopbackHub


@pytest.fixture
def finetune_hub(loopback_hub: LoopbackHub, models: Models) -> LoopbackHub:
    loopback_hub.add(FINETUNE, models.finetune)
    return loopback_hub


def test_unknown_repo(finetune_hub: LoopbackHub, run: Prepare) -> None:
    with pytest.raises(
        UsageError, match=r"no model repo someone/nothing on .*or it is private.*HF_TOKEN"
    ):
        run("someone/nothing")


def test_folder_that_looks_like_a_repo_is_pointed_out(
    finetune_hub: LoopbackHub, run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="If the local folder is meant, add --name"):
        run("models/mine")


def test_unknown_revision(finetune_hub: LoopbackHub, run: Prepare) -> None:
    with pytest.raises(UsageError, match="has no revision 'v9'"):
        run(FINETUNE, revision="v9")


def test_gated_repo_names_its_licence_page_and_the_token(
    finetune_hub: LoopbackHub, run: Prepare
) -> None:
    finetune_hub.repositories[FINETUNE].gated = True
    with pytest.raises(UsageError) as raised:
        run(FINETUNE)
    assert f"{finetune_hub.url}/{FINETUNE}" in str(raised.value)
    assert "HF_TOKEN" in str(raised.value)


def test_gated_repo_with_an_accepted_token(
    finetune_hub: LoopbackHub, run: Prepare, hub: Hub
) -> None:
    finetune_hub.repositories[FINETUNE].gated = True
    run(FINETUNE, hub=replace(hub, token=TOKEN))
    # and the token stays with the Hub: storage is another origin
    assert not any(
        request.authorised for request in finetune_hub.requests if request.path.startswith("/lfs/")
    )


def test_gated_repo_whose_licence_another_account_accepted(
    finetune_hub: LoopbackHub, run: Prepare, hub: Hub
) -> None:
    repository = finetune_hub.repositories[FINETUNE]
    repository.gated, repository.accepted_by = True, ("hf_of_somebody_else",)
    with pytest.raises(
        UsageError, match=r"Accept it at .*one is set, but it does not suffice"
    ) as e:
        run(FINETUNE, hub=replace(hub, token=TOKEN))
    assert f"{finetune_hub.url}/{FINETUNE}" in str(e.value)
    assert TOKEN not in str(e.value)
    assert not any(file.endswith(".safetensors") for file in finetune_hub.requested_files())


def test_private_repo_looks_like_none_without_a_token(
    finetune_hub: LoopbackHub, run: Prepare, hub: Hub
) -> None:
    finetune_hub.repositories[FINETUNE].private = True
    with pytest.raises(UsageError, match="or it is private"):
        run(FINETUNE)
    run(FINETUNE, hub=replace(hub, token=TOKEN))


def test_wrong_token_is_refused_without_being_shown(
    finetune_hub: LoopbackHub, run: Prepare, hub: Hub
) -> None:
    with pytest.raises(UsageError, match=r"access was refused \(HTTP 401\)") as raised:
        run(FINETUNE, hub=replace(hub, token="hf_mistyped"))
    assert "hf_mistyped" not in str(raised.value)


def test_hub_that_is_down(finetune_hub: LoopbackHub, run: Prepare) -> None:
    finetune_hub.fail("/api/models/", 418)
    with pytest.raises(PreparationError, match="the Hub answered HTTP 418") as raised:
        run(FINETUNE)
    assert raised.value.exit_code == 1


def test_hub_that_cannot_be_reached(run: Prepare, tmp_path: Path) -> None:
    with LoopbackHub() as gone:
        url = gone.url
    with pytest.raises(PreparationError, match=r"the Hub could not be reached.*HF_ENDPOINT"):
        run(FINETUNE, hub=Hub(endpoint=url, cache_dir=tmp_path / "cache"))


def test_full_disk_is_found_out_before_the_download(
    finetune_hub: LoopbackHub, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a disk that reports a megabyte free (a real full disk would need root)
    monkeypatch.setattr("preparation.assemble.shutil.disk_usage", lambda _place: _Usage(10**6))
    with pytest.raises(
        PreparationError, match=r"needs .* on the disk of .*which has 1 MB free.*HF_HOME"
    ):
        run(FINETUNE)
    assert not any(file.endswith(".safetensors") for file in finetune_hub.requested_files())


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    "text", ["/models/mine", "./mine", "mine", "a/b/c", "~/mine", "../up/x", "a/"]
)
def test_path_is_no_repo(text: str) -> None:
    assert not is_repo_id(text)


@pytest.mark.parametrize(
    "text", ["ByteDance/SDXL-Lightning", "stabilityai/stable-diffusion-xl-base-1.0"]
)
def test_repo_is_recognised(text: str) -> None:
    assert is_repo_id(text)
