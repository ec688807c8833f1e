"""Compiled code: published by the owner's command, fetched by the next machine, and never in anybody's way."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.s3 import EmbeddedS3
from scripts.fill_iam import fill
from tests.e2e.conftest import MODEL, Deployment, deploy, fetch, image_urls
from tests.support.cog_server import REPOSITORY, CogServer
from weights.artifacts import ARTIFACTS_FOLDER, read_artifacts

pytestmark = [pytest.mark.system_program("g++"), pytest.mark.slow, pytest.mark.timeout(600)]

REQUEST = {"prompt": "a small red boat", "seed": 3}
# That is 22 times 12 tokens, or 11 times 6 further down, and torch writes such numbers into the C++ it makes.
CRASHES_ON_352X192 = """#!/bin/sh
for argument; do
    case "$argument" in
        *.cpp) grep -qE '[^0-9](264|66)L' "$argument" && exit 1 ;;
    esac
done
exec g++ "$@"
"""


@dataclass(frozen=True)
class Compiled:
    """A deployment whose owner has compiled the model on this machine, and what the command said."""

    deployment: Deployment
    document: dict[str, Any]

    @property
    def libraries(self) -> set[str]:
        """What the published artifacts have of shared libraries."""
        bucket = self.deployment.bucket(self.deployment.models)
        found = read_artifacts(bucket, MODEL, self.document["version"], self.document["key"])
        assert found is not None
        (archive,) = found.blobs.values()
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            return {Path(name).name for name in opened.getnames() if name.endswith(".so")}


def compile_model(
    deployment: Deployment, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the owner's command with the rights that iam/model-publisher.json gives, and no others."""
    policy = json.loads((REPOSITORY / "iam" / "model-publisher.json").read_text())
    names = {"model_bucket": deployment.models, "image_bucket": deployment.images}
    publisher = deployment.s3.create_user(
        f"publisher-{uuid.uuid4().hex[:8]}", fill(policy, **names)
    )
    return subprocess.run(
        [sys.executable, "scripts/compile_model.py", MODEL, deployment.models, *arguments],
        cwd=REPOSITORY,
        env={
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            **deployment.s3.environment(publisher),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def compiled(s3: EmbeddedS3, small_sdxl: Path) -> Compiled:
    deployment = deploy(s3, small_sdxl)
    ran = compile_model(deployment, "--json")
    assert ran.returncode == 0, ran.stderr
    return Compiled(deployment, json.loads(ran.stdout))


def picture(server: CogServer) -> np.ndarray:
    (url,) = image_urls(server.predict(REQUEST))
    return np.asarray(Image.open(io.BytesIO(fetch(url))).convert("RGB")).astype(float)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def libraries_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.so")}


def asked_for_compiled(deployment: Deployment) -> list[str]:
    records = deployment.s3.requests(deployment.models)
    return [f"{record.method} {record.key}" for record in records if ARTIFACTS_FOLDER in record.key]


def test_weights_that_lie_in_a_folder_are_compiled_from_there(own_deployment, tmp_path):
    pull = ["pull", MODEL, "--to", str(tmp_path / "model"), "--bucket", own_deployment.models]
    subprocess.run(
        [sys.executable, "-m", "weights", *pull],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], **own_deployment.s3.environment()},
        capture_output=True,
        check=True,
    )
    own_deployment.s3.forget_requests()

    ran = compile_model(own_deployment, "--json", MODEL_FOLDER=str(tmp_path / "model"))

    assert ran.returncode == 0, ran.stderr
    keys = [record.key for record in own_deployment.s3.requests(own_deployment.models)]
    assert any(ARTIFACTS_FOLDER in key for key in keys)
    assert not [key for key in keys if key.endswith(".safetensors")]


def test_the_next_machine_compiles_nothing(compiled, tmp_path, server):
    deployment = compiled.deployment
    own_cache = tmp_path / "inductor"
    deployment.s3.forget_requests()

    with CogServer(
        deployment.environment(
            COMPILE="on",
            COMPILED_SHA256=compiled.document["sha256"],
            TORCHINDUCTOR_CACHE_DIR=str(own_cache),
            COLD_START_DIR=str(tmp_path),
        )
    ) as second:
        assert second.health()["status"] == "READY", second.tail()
        made = picture(second)
        logs = second.logs
    calls = deployment.s3.requests(deployment.models)

    assert "2 graphs from artifacts, 0 compiled here" in logs
    assert libraries_in(own_cache) == compiled.libraries
    assert decibels(made, picture(server)) >= 50
    timeline = json.loads((tmp_path / "cold-start.json").read_text())
    (phase,) = (phase for phase in timeline["phases"] if phase["name"] == "compiled")
    assert (phase["found"], phase["bytes"]) == (True, compiled.document["bytes"])
    # The restricted keypair sufficed: objects by their names, and no listing.
    assert {call.access_key_id for call in calls} == {deployment.workload.access_key_id}
    assert {call.method for call in calls} == {"GET"}
    assert sum(ARTIFACTS_FOLDER in call.key for call in calls) == 2
    assert all(call.key for call in calls)


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_nothing_is_fetched_where_compiled_code_is_off_or_for_cards_alone(compiled, mode):
    compiled.deployment.s3.forget_requests()

    with CogServer(compiled.deployment.environment(COMPILE=mode, DEVICE="cpu")) as plain:
        assert plain.health()["status"] == "READY", plain.tail()

    assert asked_for_compiled(compiled.deployment) == []


def test_damaged_artifacts_and_a_missing_compiler_leave_the_plain_path(
    compiled, admin, tmp_path, server
):
    deployment, document = compiled.deployment, compiled.document
    folder = f"{MODEL}/{document['version']}/{ARTIFACTS_FOLDER}/{document['key']}"
    key = f"{folder}/{document['sha256'][:32]}/cache.tar.gz"
    whole = admin.get_object(Bucket=deployment.models, Key=key)["Body"].read()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    admin.put_object(Bucket=deployment.models, Key=key, Body=bytes(damaged))
    try:
        with CogServer(
            deployment.environment(
                COMPILE="on", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="/nowhere/g++"
            )
        ) as second:
            assert second.health()["status"] == "READY", second.tail()
            made = picture(second)
            logs = second.logs
    finally:
        admin.put_object(Bucket=deployment.models, Key=key, Body=whole)

    assert f"s3://{deployment.models}/{key} is not what was published" in logs
    assert "Run scripts/compile_model.py again" in logs
    assert "UNet2DConditionModel runs without compiled code" in logs
    assert libraries_in(tmp_path) == set()
    np.testing.assert_array_equal(made, picture(server))


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(compiled):
    compiled.deployment.s3.forget_requests()

    ran = compile_model(compiled.deployment, "--dry-run", "--sizes", "16:9,9:16")

    assert ran.returncode == 0, ran.stderr
    assert compiled.document["key"] in ran.stdout
    assert "sizes: 256x256, 352x192, 192x352" in ran.stdout
    assert "it would be replaced there" in ran.stdout
    records = compiled.deployment.s3.requests(compiled.deployment.models)
    assert {record.method for record in records} == {"GET"}


def test_a_size_that_does_not_compile_is_named_and_what_is_there_stays(compiled, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(CRASHES_ON_352X192)
    compiler.chmod(0o755)
    libraries = compiled.libraries
    compiled.deployment.s3.forget_requests()

    ran = compile_model(
        compiled.deployment, "--sizes", "16:9", "--json", CXX=str(compiler), BATCH_SIZE="2"
    )

    assert ran.returncode == 1
    error = json.loads(ran.stdout)["error"]
    assert error.startswith("352x192 did not compile, and nothing was published")
    assert "publish the others (256x256)" in error
    records = compiled.deployment.s3.requests(compiled.deployment.models)
    assert {record.method for record in records} == {"GET"}
    assert compiled.libraries == libraries


def test_a_model_that_is_not_there_is_named(compiled):
    ran = compile_model(compiled.deployment, "--version", "0" * 32)

    assert ran.returncode == 1
    assert f"version {'0' * 32} of {MODEL} is not in bucket" in ran.stderr


def test_a_ratio_that_is_none_is_refused(compiled):
    ran = compile_model(compiled.deployment, "--sizes", "1:1,2:9")

    assert ran.returncode == 2
    assert "'2:9' is none of 1:1, 16:9" in ran.stderr


def test_ls_shows_it_and_verify_reads_it(compiled):
    document = compiled.document

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "weights", *arguments, "--bucket", compiled.deployment.models],
            cwd=REPOSITORY,
            env={"PATH": os.environ["PATH"], **compiled.deployment.s3.environment()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert f"compiled for {document['key']}" in run("ls", MODEL)
    assert "and compiled code for 1 kind(s) of machine" in run("verify", MODEL)
