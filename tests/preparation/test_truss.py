"""A Truss config's model_cache: every entry a model of its own, and nothing published where one of them is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preparation import Request, UsageError
from preparation.hub import Hub
from preparation.truss import plan_truss, read_truss
from settings import load_source_settings
from tests.preparation.conftest import BASE, FINETUNE, LIGHTNING, VAE, Models, Ran
from tests.preparation.repositories import write_decoys
from tests.preparation.sources import put_folder
from tests.support.hub import LoopbackHub
from weights import Bucket, find_snapshot
from weights.listing import list_models

Command = Callable[..., Ran]


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Write a config and return its path."""

    def written(text: str) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return file

    return written


Config = Callable[[str], Path]


def _read(file: Path) -> list[Request]:
    return read_truss(file, Request(""))


def test_every_entry_is_published_as_a_model_of_its_own(
    lightning_hub: LoopbackHub,
    command: Command,
    bucket: Bucket,
    new_bucket: Callable[[], str],
    admin: Any,
    models: Models,
    config: Config,
) -> None:
    # given a config as Truss's own documentation has them, one model of it in a bucket
    origin = new_bucket()
    put_folder(admin, origin, models.half, "team/mine")
    file = config(f"""
model_name: pictures
resources: {{accelerator: L4, use_gpu: true}}
model_cache:
  - repo_id: {LIGHTNING}
    revision: main
    use_volume: true
    volume_folder: lightning
  - repo_id: {BASE}
    ignore_patterns: ["*.fp16.*"]
  - repo_id: s3://{origin}/team/mine
    kind: s3
    runtime_secret_name: aws_secret_json
""")
    # when
    ran = command(file, bucket.name, "--from-truss")
    # then
    assert ran.code == 0, ran.err
    assert list_models(bucket) == sorted([LIGHTNING, BASE, f"{origin}/team/mine"])
    lightning = find_snapshot(bucket, LIGHTNING).recipe or {}
    assert lightning["steps"] == [4]
    base = find_snapshot(bucket, BASE).recipe or {}
    assert (base["dtype"], base["source"]["ignore"]) == ("float32", ["*.fp16.*"])
    assert f"MODEL_PATH={origin}/team/mine" in ran.out
    assert f"{BASE} (2 of 3)" in ran.out


def test_entry_that_is_no_pipeline_is_named_before_any_weights_move(
    lightning_hub: LoopbackHub, command: Command, bucket: Bucket, config: Config
) -> None:
    file = config(f"model_cache:\n- repo_id: {BASE}\n- repo_id: {VAE}\n")
    ran = command("--from-truss", file, bucket.name)
    assert ran.code == 2
    assert f"Entry 2 ({VAE}) of {file} cannot be published, so nothing was" in ran.err
    assert "It is a single component, AutoencoderKL." in ran.err
    assert list(bucket.list("")) == []
    weights = [file for file in lightning_hub.requested_files() if file.endswith(".safetensors")]
    assert weights == []


def test_language_model_is_named_for_what_it_is(
    loopback_hub: LoopbackHub, hub: Hub, config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "llm"
    write_decoys(folder, ("model.safetensors", "tokenizer.json"))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    loopback_hub.add("someone/llm", folder)
    file = config("model_cache: [{repo_id: someone/llm}]")
    requests = read_truss(file, Request("", hub=hub))
    with pytest.raises(UsageError, match=r"Entry 1 \(someone/llm\).*transformers model, LlamaFor"):
        plan_truss(file, requests)


def test_pattern_that_hides_a_needed_file_is_named_with_its_entry(
    loopback_hub: LoopbackHub, hub: Hub, config: Config, models: Models
) -> None:
    # given what Truss's documentation has for SDXL base, which leaves a tokenizer's merges.txt out
    loopback_hub.add(BASE, models.base)
    file = config(
        f"model_cache:\n- repo_id: {BASE}\n  allow_patterns: ['*.json', '*.fp16.safetensors']\n"
    )
    with pytest.raises(UsageError, match=r"Entry 1 .*No --allow pattern matches tokenizer/merges"):
        plan_truss(file, read_truss(file, Request("", hub=hub)))


def test_missing_folder_in_a_bucket_is_named_with_its_entry(
    s3: Any, new_bucket: Callable[[], str], config: Config, tmp_path: Path
) -> None:
    file = config(f"model_cache:\n- repo_id: s3://{new_bucket()}/nothing\n")
    access = load_source_settings(s3.environment())
    requests = read_truss(file, Request("", access=access, folder=tmp_path))
    with pytest.raises(
        UsageError, match=r"Entry 1 .* There is nothing under s3://.*bucket is empty"
    ):
        plan_truss(file, requests)


def test_old_name_of_the_block_is_known(config: Config) -> None:
    (request,) = _read(config(f"hf_cache:\n- repo_id: {FINETUNE}\n  revision: v1\n"))
    assert (request.source, request.revision, request.model_path) == (FINETUNE, "v1", FINETUNE)


def test_patterns_and_revision_come_from_the_entry(config: Config) -> None:
    text = f"""
model_cache:
- repo_id: {FINETUNE}
  revision: ""
  allow_patterns: ["*.json", "*.txt"]
  ignore_patterns: ["unet/*"]
"""
    (request,) = _read(config(text))
    assert request.revision is None
    assert request.patterns.allow == ("*.json", "*.txt")
    assert request.patterns.ignore == ("unet/*",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_cache: [", r"config\.yaml is not YAML: .* in line 1, column"),
        ("- a\n- b\n", r"config\.yaml holds a list, where a Truss config has keys"),
        ("", r"config\.yaml holds nothing, where a Truss config has keys"),
        ("model_name: x\n", r"config\.yaml has no model_cache"),
        ("model_cache: []\n", "model_cache of .* has no entries"),
        ("model_cache: a/b\n", r"model_cache of .* is text, not a list of entries"),
        ("model_cache: [{repo_id: a/b}]\nhf_cache: [{repo_id: a/b}]\n", "both model_cache and hf"),
        ("model_cache: [a/b]\n", "Entry 1 of .*: it is text, where keys such as repo_id belong"),
        ("model_cache: [{repo_id: a/b}, {revision: x}]\n", "Entry 2 of .*: repo_id is missing"),
        (
            "model_cache: [{repo_id: a/b, repo: c}]\n",
            r"Entry 1 \(a/b\) .*'repo' is no key .*repo_id",
        ),
        (
            "model_cache: [{repo_id: a/b, revision: 1.0}]\n",
            r"revision: .*string \(put it in quotes\)",
        ),
        (
            "model_cache: [{repo_id: a/b, allow_patterns: 'x'}]\n",
            "allow_patterns: should be a list",
        ),
        ("model_cache: [{repo_id: a/b, ignore_patterns: [1]}]\n", r"ignore_patterns\.0: .*string"),
        ("model_cache: [{repo_id: ./mine}]\n", r"'\./mine' is neither a Hub repo"),
        ("model_cache: [{repo_id: 'az://a/b'}]\n", r"Entry 1 \(az://a/b\) .*cannot be a source"),
        ("model_cache: [{repo_id: a/b, kind: s3}]\n", "kind is 's3', but a/b is a Hub repo"),
        ("model_cache: [{repo_id: a/b}, {repo_id: a/b}]\n", "Entries 1 and 2 .* published as a/b"),
        ("!!python/object/apply:os.system ['true']\n", r"config\.yaml is not YAML"),
    ],
)
def test_wrong_config_is_refused_with_the_place(config: Config, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _read(config(text))


def test_revision_of_an_entry_in_a_bucket_is_refused(config: Config) -> None:
    file = config("model_cache: [{repo_id: 's3://models/mine', revision: main}]\n")
    with pytest.raises(UsageError, match=r"Entry 1 .*--revision is of a Hub repo"):
        plan_truss(file, _read(file))


def test_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"Reading {tmp_path}/config.yaml: No such file"):
        _read(tmp_path / "config.yaml")


@pytest.mark.parametrize("option", ["--name", "--revision", "--allow", "--ignore"])
def test_what_an_entry_says_itself_is_not_given_beside_the_config(
    command: Command, config: Config, option: str
) -> None:
    ran = command(config("model_cache: [{repo_id: a/b}]"), "models", "--from-truss", option, "x")
    assert ran.code == 2
    assert f"leave out {option}" in ran.err
