"""--allow and --ignore: what they leave to choose from, on every kind of source, and what they must not take away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from preparation import UsageError
from preparation.patterns import EVERYTHING, Patterns
from tests.preparation.conftest import BASE, LIGHTNING, Models, Prepare, Ran
from tests.preparation.repositories import WEIGHTS
from tests.support.hub import LoopbackHub
from weights import Bucket, find_snapshot

Own = Callable[[Path], Path]
PLAIN = Patterns(ignore=("*.fp16.*",))
# What Truss's own documentation gives for SDXL base, and "*.txt", which its tokenizers need.
OF_TRUSS = Patterns(allow=("*.json", "*.fp16.safetensors", "sd_xl_base_1.0.safetensors", "*.txt"))


def test_ignoring_the_half_precision_variant_takes_the_plain_one(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(BASE, models.base)
    prepared = run(BASE, patterns=PLAIN)
    taken = {file for file in loopback_hub.requested_files() if file.endswith(".safetensors")}
    assert taken == {f"{BASE}/{folder}/{stem}.safetensors" for folder, stem in WEIGHTS.items()}
    assert prepared.recipe.dtype == "float32"
    for folder, stem in WEIGHTS.items():
        path = f"{folder}/{stem}.safetensors"
        assert (prepared.folder / path).read_bytes() == (models.full / path).read_bytes()


def test_allowed_files_that_make_a_pipeline_are_enough(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(BASE, models.base)
    prepared = run(BASE, patterns=OF_TRUSS)
    assert prepared.recipe.dtype == "float16"
    assert not any("sd_xl_base" in file for file in loopback_hub.requested_files())


def test_patterns_hold_for_a_folder_too_and_are_recorded(run: Prepare, models: Models) -> None:
    source = run(models.base, name="me/model", patterns=PLAIN).recipe.source
    assert source is not None
    assert source.model_dump(mode="json") == {
        **dict.fromkeys(("repo", "revision", "licence", "parts")),
        "ignore": ["*.fp16.*"],
    }


def test_source_that_was_taken_as_it_is_does_not_mention_patterns(
    loopback_hub: LoopbackHub, run: Prepare, models: Models
) -> None:
    loopback_hub.add(BASE, models.base)
    source = run(BASE).recipe.source
    assert source is not None
    assert set(source.model_dump()) == {"repo", "revision", "licence", "parts"}


def test_other_patterns_replace_what_was_prepared_before(run: Prepare, models: Models) -> None:
    first = run(models.base, name="me/model")
    assert first.recipe.dtype == "float16"
    assert run(models.base, name="me/model", patterns=PLAIN).recipe.dtype == "float32"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (Patterns(ignore=("vae/*",)), r"--ignore 'vae/\*' hides vae/config\.json .* Narrow"),
        (Patterns(ignore=("*.png", "*.txt")), r"--ignore '\*\.txt' hides tokenizer/merges\.txt"),
        (Patterns(ignore=("*.safetensors",)), r"'\*\.safetensors' hides text_encoder/model\.fp16"),
        (Patterns(ignore=("model_index.json",)), r"hides model_index\.json"),
        (
            Patterns(allow=("*.json", "*.fp16.safetensors")),
            r"No --allow pattern matches tokenizer/merges\.txt .*'\*\.json', '\*\.fp16\.safetensors'",
        ),
        (Patterns(allow=("*.json", "*.txt")), r"No --allow pattern matches text_encoder/model\."),
    ],
)
def test_pattern_that_hides_a_needed_file_is_named(
    run: Prepare, models: Models, patterns: Patterns, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(models.base, name="me/model", patterns=patterns)


def test_component_that_has_no_other_variant_is_the_one_that_is_named(
    run: Prepare, models: Models, own: Own
) -> None:
    folder = own(models.base)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"hides vae/diffusion_pytorch_model\.fp16\.safetensors"):
        run(folder, name="me/model", patterns=PLAIN)


def test_owners_recipe_is_not_lost_to_a_pattern(run: Prepare, models: Models, own: Own) -> None:
    folder = own(models.full)
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(UsageError, match=r"'recipe\*' hides recipe\.json"):
        run(folder, name="me/model", patterns=Patterns(ignore=("recipe*",)))


def test_patterns_of_lightning_are_of_the_repo_that_was_named(
    lightning_hub: LoopbackHub, run: Prepare
) -> None:
    allowed = Patterns(allow=("sdxl_lightning_4step_unet.safetensors",))
    source = run(LIGHTNING, patterns=allowed).recipe.source
    assert source is not None
    assert source.allow == allowed.allow
    with pytest.raises(UsageError, match=r"hides sdxl_lightning_4step_unet\.safetensors"):
        run(LIGHTNING, patterns=Patterns(ignore=("*4step*",)))


def test_patterns_may_be_given_several_times_on_the_command_line(
    command: Callable[..., Ran], bucket: Bucket, models: Models
) -> None:
    given = ("--ignore", "*.fp16.*", "--ignore", "*.onnx", "--allow", "*")
    ran = command(models.base, bucket.name, "--name", "me/model", *given)
    assert ran.code == 0, ran.err
    recipe = find_snapshot(bucket, "me/model").recipe
    assert recipe is not None
    assert recipe["dtype"] == "float32"
    assert recipe["source"]["ignore"] == ["*.fp16.*", "*.onnx"]
    assert recipe["source"]["allow"] == ["*"]


def test_no_patterns_leave_everything() -> None:
    files = {"a/b.json": 1, "c": 2}
    assert not EVERYTHING
    assert EVERYTHING.narrow(files) == files
