"""A diffusers folder on this disk: the same rules, the owner's recipe, and nothing from outside the folder."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from preparation import PreparationError, Progress, Request, UsageError, make_plan, prepare
from preparation.amounts import human_size
from preparation.folder import LocalFolder
from tests.preparation.conftest import Models, Prepare
from tests.preparation.repositories import write_decoys

Own = Callable[[Path], Path]
RECIPE = {
    "scheduler": {
        "class_name": "EulerDiscreteScheduler",
        "config": {"timestep_spacing": "trailing"},
    },
    "dtype": "float32",
    "steps": [4],
    "default_steps": 4,
    "guidance_scale": 0.0,
    "guidance_free": True,
    "native_size": 256,
}


def _files(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def test_only_what_a_pipeline_needs_is_taken(run: Prepare, models: Models, own: Own) -> None:
    folder = own(models.full)
    before = _files(folder)
    write_decoys(
        folder, ("unet/diffusion_pytorch_model.bin", "sample.png", ".git/HEAD", "vae/.DS_Store")
    )
    assert _files(run(folder, name="me/model").folder) == before


def test_recipe_beside_the_model_is_used_and_stock_diffusers_is_told_of_it(
    run: Prepare, models: Models, own: Own
) -> None:
    folder = own(models.full)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    prepared = run(folder, name="me/model")
    assert prepared.recipe.steps == (4,)
    assert prepared.recipe.guidance_free
    scheduler = json.loads((prepared.folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing"
    assert not (prepared.folder / "recipe.json").exists()


def test_recipe_can_name_another_scheduler(run: Prepare, models: Models, own: Own) -> None:
    folder = own(models.full)
    recipe = {**RECIPE, "scheduler": {"class_name": "LCMScheduler", "config": {}}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    prepared = run(folder, name="me/model").folder
    index = json.loads((prepared / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": [0]}, r"recipe\.json in .* cannot be used.*steps"),
        ({"guidance": 1}, r"recipe\.json in .* cannot be used.*guidance"),
        ({"dtype": "float16"}, r"says dtype float16, but its unet holds float32"),
    ],
)
def test_wrong_recipe_is_refused_with_the_reason(
    run: Prepare, models: Models, own: Own, changed: dict[str, object], message: str
) -> None:
    folder = own(models.full)
    (folder / "recipe.json").write_text(json.dumps({**RECIPE, **changed}))
    with pytest.raises(UsageError, match=message):
        run(folder, name="me/model")


def test_folder_without_a_recipe_gets_one_from_its_configs(run: Prepare, models: Models) -> None:
    recipe = run(models.half, name="me/model").recipe
    assert (recipe.dtype, recipe.native_size, recipe.steps) == ("float16", 256, None)
    assert recipe.source is None


def test_folder_needs_a_name(models: Models) -> None:
    with pytest.raises(UsageError, match="add --name, for example --name me/full"):
        make_plan(Request(str(models.full)))


@pytest.mark.parametrize("name", ["../up", "/root", "a//b", "", "a/./b", "a\\b"])
def test_name_that_is_no_plain_path_is_refused(models: Models, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        make_plan(Request(str(models.full), name=name))


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"There is no folder {tmp_path}/nothing"):
        make_plan(Request(f"{tmp_path}/nothing", name="me/model"))


def test_folder_that_is_no_diffusers_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        make_plan(Request(str(tmp_path), name="me/model"))


def test_link_out_of_the_folder_is_refused(models: Models, own: Own, tmp_path: Path) -> None:
    folder = own(models.full)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "tokenizer/vocab.json").unlink()
    (folder / "tokenizer/vocab.json").symlink_to(secret)
    with pytest.raises(UsageError, match=r"vocab\.json is a link that leads out of the folder"):
        LocalFolder.open(folder)


@pytest.mark.parametrize("place", ["own/elsewhere", "own/full/.hidden", "own/full/vae_old"])
def test_link_to_a_folder_is_refused(models: Models, own: Own, tmp_path: Path, place: str) -> None:
    folder = own(models.full)
    (folder / "vae").rename(tmp_path / place)
    (folder / "vae").symlink_to(tmp_path / place)
    with pytest.raises(UsageError, match=r"/full/vae is a link to a folder, .*Copy the folder"):
        LocalFolder.open(folder)


@pytest.mark.parametrize("hidden", [".env", ".git/config"])
def test_link_to_a_hidden_file_is_refused(models: Models, own: Own, hidden: str) -> None:
    folder = own(models.full)
    write_decoys(folder, (hidden,))
    (folder / "tokenizer/notes.txt").symlink_to(folder / hidden)
    with pytest.raises(UsageError, match=r"notes\.txt is a link to a hidden file"):
        LocalFolder.open(folder)


def test_link_to_a_file_of_the_folder_is_followed(run: Prepare, models: Models, own: Own) -> None:
    folder = own(models.full)
    vocabulary = folder / "tokenizer/vocab.json"
    vocabulary.rename(folder / "vocabulary.json")
    vocabulary.symlink_to("../vocabulary.json")
    published = run(folder, name="me/model").folder / "tokenizer/vocab.json"
    assert published.read_bytes() == (models.full / "tokenizer/vocab.json").read_bytes()
    assert not published.is_symlink()


def test_link_to_nothing_is_refused(models: Models, own: Own) -> None:
    folder = own(models.full)
    (folder / "tokenizer/notes.txt").symlink_to("gone.txt")
    with pytest.raises(UsageError, match=r"notes\.txt is a link to .*which is not there"):
        LocalFolder.open(folder)


def test_folder_that_cannot_be_read_is_refused(models: Models, own: Own) -> None:
    # given a folder that nobody can list by its path, not even root, who may read all others
    folder = own(models.full)
    place = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("deep" * 60, dir_fd=place)
        inner = os.open("deep" * 60, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    # when, then
    with pytest.raises(PreparationError, match=f"Listing {folder}: File name too long"):
        LocalFolder.open(folder)


def test_weights_that_cannot_be_linked_are_copied_in_a_stage_of_its_own(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a disk across which nothing can be linked (a second one would need root)
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    shown = io.StringIO()
    request = Request(str(models.full), name="me/model", folder=tmp_path / "prepared")
    # when
    prepared = prepare(request, make_plan(request), Progress(shown)).folder
    # then
    weights = sorted(path.relative_to(models.full) for path in models.full.rglob("*.safetensors"))
    sizes = [(models.full / path).stat().st_size for path in weights]
    total = sum(size for size in sizes if size >= 1_000_000)
    assert shown.getvalue().startswith(f"Copy: {human_size(total)} in ")
    for path in weights:
        assert (prepared / path).read_bytes() == (models.full / path).read_bytes()


def test_copying_can_be_interrupted_and_leaves_nothing_half_done(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a copy that the person interrupts, as soon as the display shows it
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    request = Request(str(models.full), name="me/model", folder=tmp_path / "prepared")
    plan = make_plan(request)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(_Interrupting())
    # when
    with pytest.raises(KeyboardInterrupt), progress.stopping_on_signals():
        prepare(request, plan, progress)
    # then
    assert not list((tmp_path / "prepared").glob("*"))


class _Interrupting(io.StringIO):
    """A terminal before which somebody presses Ctrl-C when they see that copying has begun."""

    has_interrupted = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "Copy" in text and not self.has_interrupted:
            self.has_interrupted = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_snapshot_in_the_hubs_own_cache_can_be_given_as_a_folder(
    run: Prepare, models: Models, own: Own
) -> None:
    # given a snapshot as huggingface_hub lays it out: links to the blobs beside it
    blobs, snapshot = own(models.full).parent / "blobs", own(models.half).parent / "snapshots/abc"
    blobs.mkdir()
    for number, file in enumerate(sorted(models.full.rglob("*.*"))):
        link = snapshot / file.relative_to(models.full)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(blobs / str(number))
    # when, then
    assert _files(run(snapshot, name="me/model").folder) == _files(models.full)


def test_folder_of_someone_elses_is_never_replaced(
    run: Prepare, models: Models, tmp_path: Path
) -> None:
    mine = tmp_path / "prepared/me--model"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by this script"):
        run(models.full, name="me/model")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_changed_source_replaces_the_prepared_folder(
    run: Prepare, models: Models, own: Own
) -> None:
    folder = own(models.full)
    first = run(folder, name="me/model").folder / "tokenizer/vocab.json"
    content = first.read_text()
    (folder / "tokenizer/vocab.json").write_text(content + "\n")
    second = run(folder, name="me/model").folder / "tokenizer/vocab.json"
    assert second.read_text() == content + "\n"
    assert not list(second.parents[2].glob("*.partial"))


def test_prepared_folder_that_somebody_changed_is_made_again(run: Prepare, models: Models) -> None:
    prepared = run(models.full, name="me/model").folder / "model_index.json"
    content = prepared.read_text()
    prepared.write_text("{}")
    assert (run(models.full, name="me/model").folder / "model_index.json").read_text() == content


def test_weights_cut_short_are_named(run: Prepare, models: Models, own: Own) -> None:
    folder = own(models.full)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        PreparationError, match=r"vae of .*diffusion_pytorch_model\.safetensors cannot be"
    ):
        run(folder, name="me/model")
