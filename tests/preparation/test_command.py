"""scripts/prepare_model.py as a person runs it: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from tests.preparation.conftest import FINETUNE, LIGHTNING, SCRIPT, TOKEN, Models, Ran
from tests.support.hub import LoopbackHub
from weights import Bucket

Command = Callable[..., Ran]


def _keys(bucket: Bucket) -> list[str]:
    return [found.key for found in bucket.list("")]


def test_lightning_is_published_and_the_deployments_environment_is_printed(
    lightning_hub: LoopbackHub, command: Command, bucket: Bucket, s3: EmbeddedS3
) -> None:
    ran = command(LIGHTNING, bucket.name)
    assert ran.code == 0, ran.err
    assert f"{LIGHTNING}/latest.json" in _keys(bucket)
    # one line a stage where there is no terminal
    stages = [line.split(":")[0] for line in ran.err.splitlines()]
    assert stages == ["Download", "Check", "Convert", "Hash", "Upload"]
    block = ran.out.split("The environment of a deployment:\n\n")[1].splitlines()
    assert block == [
        "AWS_ACCESS_KEY_ID=<access key ID of the workload keypair>",
        "AWS_SECRET_ACCESS_KEY=<secret access key of the workload keypair>",
        f"AWS_ENDPOINT_URL_S3={s3.endpoint_url}",
        "AWS_REGION=auto",
        f"MODEL_PATH={LIGHTNING}",
        f"MODEL_BUCKET_NAME={bucket.name}",
        "PUBLIC_BUCKET_NAME=generated-images",
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
    ran = command(LIGHTNING, bucket.name, "--dry-run")
    assert ran.code == 0, ran.err
    assert "sdxl_lightning_4step_unet.safetensors" in ran.out
    assert "text_encoder_2/model.fp16.safetensors" in ran.out
    assert "Dry run: nothing was written" in ran.out
    weights = [file for file in lightning_hub.requested_files() if file.endswith(".safetensors")]
    assert weights == []
    assert len(s3.requests()) == before
    assert not (tmp_path / "prepared").exists()


def test_dry_run_of_a_folder_compares_with_the_bucket_and_writes_nothing(
    command: Command, bucket: Bucket, models: Models
) -> None:
    ran = command(models.full, bucket.name, "--name", "me/model", "--dry-run")
    assert ran.code == 0, ran.err
    assert "upload" in ran.out
    assert "unet/diffusion_pytorch_model.safetensors" in ran.out
    assert _keys(bucket) == []


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
