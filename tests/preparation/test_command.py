"""scripts/prepare_model.py as a person runs it: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from preparation import PreparationError
from preparation.lock import claim
from tests.preparation.conftest import (
    BASE,
    FINETUNE,
    LIGHTNING,
    SCRIPT,
    TOKEN,
    VAE,
    Models,
    Ran,
)
from tests.support.hub import LoopbackHub
from weights import Bucket, find_snapshot, read_latest
from weights.pull import verify

Command = Callable[..., Ran]


def _keys(bucket: Bucket) -> list[str]:
    return [found.key for found in bucket.list("")]


def test_lightning_is_published_and_the_deployments_environment_is_printed(
    lightning_hub: LoopbackHub, command: Command, bucket: Bucket, s3: EmbeddedS3
) -> None:
    ran = command(LIGHTNING, bucket.name)
    assert ran.code == 0, ran.err
    assert f"{LIGHTNING}/latest.json" in _keys(bucket)
    for repo in (LIGHTNING, BASE, VAE):
        assert f"  {repo}@{lightning_hub.repositories[repo].branches['main']}\n" in ran.out
    # one line a stage where there is no terminal
    stages = [line.split(":")[0] for line in ran.err.splitlines()]
    assert stages == ["Download", "Check", "Convert", "Try VAE", "Hash", "Upload"]
    block = ran.out.split("The environment of a deployment:\n\n")[1].splitlines()
    assert block == [
        "AWS_ACCESS_KEY_ID=<access key ID of the workload keypair>",
        "AWS_SECRET_ACCESS_KEY=<secret access key of the workload keypair>",
        f"AWS_ENDPOINT_URL_S3={s3.endpoint_url}",
        "AWS_REGION=auto",
        f"MODEL_PATH={LIGHTNING}",
        f"MODEL_BUCKET_NAME={bucket.name}",
        "PUBLIC_BUCKET_NAME=<your image bucket>",
    ]
    assert s3.admin.access_key_id not in ran.out + ran.err


def test_offline_with_a_warm_cache_publishes_the_same_version(
    loopback_hub: LoopbackHub, command: Command, bucket: Bucket, models: Models, tmp_path: Path
) -> None:
    # given a first run with a network, and a Hub that nobody asks any more
    loopback_hub.add(FINETUNE, models.finetune)
    assert command(FINETUNE, bucket.name).code == 0
    (tmp_path / "prepared").rename(tmp_path / "put away")
    loopback_hub.forget()
    # when
    ran = command(FINETUNE, bucket.name, HF_HUB_OFFLINE="1")
    # then
    assert ran.code == 0, ran.err
    assert "Unchanged" in ran.out
    assert loopback_hub.requests == []


def test_offline_with_a_cold_cache_says_so(command: Command, bucket: Bucket) -> None:
    ran = command(LIGHTNING, bucket.name, HF_HUB_OFFLINE="1")
    assert ran.code == 1
    assert "offline mode is on (HF_HUB_OFFLINE)" in ran.err


def test_dry_run_of_a_repo_downloads_no_weights_and_touches_no_bucket(
    lightning_hub: LoopbackHub, command: Command, bucket: Bucket, s3: EmbeddedS3, tmp_path: Path
) -> None:
    before = len(s3.requests())
    ran = command(LIGHTNING, bucket.name, "--dry-run", "--prune", "1")
    assert ran.code == 0, ran.err
    assert "known once the model has been prepared" in ran.out
    assert "sdxl_lightning_4step_unet.safetensors" in ran.out
    assert "text_encoder_2/model.fp16.safetensors" in ran.out
    assert "Dry run: nothing was written" in ran.out
    weights = [file for file in lightning_hub.requested_files() if file.endswith(".safetensors")]
    assert weights == []
    assert len(s3.requests()) == before
    assert not (tmp_path / "prepared").exists()


def test_dry_run_of_a_folder_compares_with_the_bucket_and_says_what_it_left_on_this_disk(
    command: Command, bucket: Bucket, models: Models, tmp_path: Path
) -> None:
    ran = command(models.full, bucket.name, "--name", "me/model", "--dry-run")
    assert ran.code == 0, ran.err
    assert "upload" in ran.out
    assert "unet/diffusion_pytorch_model.safetensors" in ran.out
    assert _keys(bucket) == []
    folder = tmp_path / "prepared/me--model"
    assert f"prepared in {folder}, where it is kept for the real run" in ran.out
    # and so it is
    ran = command(models.full, bucket.name, "--name", "me/model")
    assert f"Already prepared in {folder}" in ran.err


def test_second_run_of_the_same_model_at_once_is_refused(
    command: Command, bucket: Bucket, models: Models, tmp_path: Path
) -> None:
    folder = tmp_path / "prepared/me--model"
    with claim(folder):
        ran = command(models.full, bucket.name, "--name", "me/model")
        assert ran.code == 1, ran.err
        assert f"Another run is preparing this model in {folder}; wait for it" in ran.err
        assert command(models.full, bucket.name, "--name", "me/other").code == 0
    # and when the first has ended
    assert command(models.full, bucket.name, "--name", "me/model").code == 0
    assert not list((tmp_path / "prepared").glob("*.lock"))


def test_run_that_was_killed_locks_nobody_out(tmp_path: Path) -> None:
    # given the lock of a process that could not put it away
    holding = (
        "import sys; from pathlib import Path; from preparation.lock import claim\n"
        "with claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path / "model")],
        cwd=SCRIPT.parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(PreparationError), claim(tmp_path / "model"):
            pass
        child.kill()
    assert (tmp_path / "model.lock").exists()
    # when, then
    with claim(tmp_path / "model"):
        pass
    assert not (tmp_path / "model.lock").exists()


def test_object_that_was_damaged_in_the_bucket_is_mended_by_repair_alone(
    command: Command, bucket: Bucket, models: Models, admin: Any
) -> None:
    # given a published file with one byte flipped, all that the bucket says of it as it was
    arguments = (models.full, bucket.name, "--name", "me/model")
    assert command(*arguments).code == 0
    (key,) = [key for key in _keys(bucket) if key.endswith("vae/config.json")]
    found = admin.get_object(Bucket=bucket.name, Key=key)
    content = bytearray(found["Body"].read())
    content[-2] ^= 1
    admin.put_object(Bucket=bucket.name, Key=key, Body=bytes(content), Metadata=found["Metadata"])
    # when, then
    ran = command(*arguments)
    assert ran.code == 0, ran.err
    assert "Unchanged" in ran.out
    assert verify(bucket, find_snapshot(bucket, "me/model")).problems
    # when, then
    ran = command(*arguments, "--repair")
    assert ran.code == 0, ran.err
    assert "0 uploaded" not in ran.out
    assert not verify(bucket, find_snapshot(bucket, "me/model")).problems


def test_latest_that_cannot_be_read_is_mended_by_publishing(
    command: Command, bucket: Bucket, models: Models
) -> None:
    arguments = (models.full, bucket.name, "--name", "me/model")
    assert command(*arguments).code == 0
    bucket.put("me/model/latest.json", b"{", content_type="application/json")
    ran = command(*arguments)
    assert ran.code == 0, ran.err
    assert read_latest(bucket, "me/model")


def test_gated_repo_is_read_with_the_token_of_the_environment(
    loopback_hub: LoopbackHub, command: Command, bucket: Bucket, models: Models
) -> None:
    loopback_hub.add(FINETUNE, models.finetune, gated=True)
    refused = command(FINETUNE, bucket.name)
    assert refused.code == 2
    assert f"{loopback_hub.url}/{FINETUNE}" in refused.err
    accepted = command(FINETUNE, bucket.name, HF_TOKEN=TOKEN)
    assert accepted.code == 0, accepted.err
    assert TOKEN not in accepted.out + accepted.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["someone/nothing", "models"], "no model repo someone/nothing"),
        (["/no/such/folder", "models", "--name", "a/b"], "There is no folder /no/such/folder"),
        (["a/b", "models", "--name", "../up"], "--name '../up' cannot be a model's path"),
        (["a/b", "models", "-j", "0"], "0 is not between 1 and 256"),
        (["a/b"], "the following arguments are required: BUCKET"),
    ],
)
def test_mistake_ends_with_code_2_and_one_clear_message(
    command: Command, arguments: list[str], message: str
) -> None:
    ran = command(*arguments)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "does not belong to the access key ID"),
        ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "access key ID"),
        ({"AWS_REGION": "a b"}, "AWS_REGION"),
    ],
)
def test_wrong_keys_are_found_out_before_any_weights_move(
    loopback_hub: LoopbackHub,
    command: Command,
    bucket: Bucket,
    models: Models,
    changed: dict[str, str],
    message: str,
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    ran = command(FINETUNE, bucket.name, **changed)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert not any(file.endswith(".safetensors") for file in loopback_hub.requested_files())


def test_wrong_bucket_is_named(loopback_hub: LoopbackHub, command: Command, models: Models) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    ran = command(FINETUNE, "no-such-bucket")
    assert ran.code == 2, ran.err
    assert "no-such-bucket" in ran.err
    assert "the bucket does not exist" in ran.err


def test_keypair_that_may_only_read_is_refused_and_publishes_nothing(
    command: Command, bucket: Bucket, models: Models, s3: EmbeddedS3
) -> None:
    resource = f"arn:aws:s3:::{bucket.name}/*"
    reader = s3.create_user(
        f"reader-of-{bucket.name}",
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": resource}],
        },
    )
    ran = command(models.full, bucket.name, "--name", "me/model", **s3.environment(reader))
    assert ran.code == 2, ran.err
    assert f"s3://{bucket.name}/me/model" in ran.err
    assert reader.secret_access_key not in ran.out + ran.err
    assert _keys(bucket) == []


def test_bucket_that_cannot_be_reached_is_a_failure(
    loopback_hub: LoopbackHub, command: Command, models: Models
) -> None:
    with LoopbackHub() as gone:
        url = gone.url
    loopback_hub.add(FINETUNE, models.finetune)
    ran = command(FINETUNE, "models", AWS_ENDPOINT_URL_S3=url)
    assert ran.code == 1, ran.err
    assert "the server could not be reached" in ran.err


def test_interrupt_ends_with_one_line_and_leaves_nothing_half_done(
    loopback_hub: LoopbackHub,
    environment: dict[str, str],
    bucket: Bucket,
    models: Models,
    tmp_path: Path,
) -> None:
    # given a download that stalls
    loopback_hub.add(FINETUNE, models.finetune)
    loopback_hub.hold("/lfs/")
    child = subprocess.Popen(
        [sys.executable, SCRIPT, FINETUNE, bucket.name, "--destdir", str(tmp_path / "prepared")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # when
        loopback_hub.wait_until_held()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)  # the Hub lets go of its requests after 60
    finally:
        loopback_hub.release()
        child.kill()
        child.wait()
    # then
    assert child.returncode == 130
    assert err.strip() == "Interrupted. Run the same command again: finished files are kept."
    assert _keys(bucket) == []
    assert not list((tmp_path / "prepared").glob("*"))
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
