"""The policies in iam/: what they allow, and filling bucket names in. Enforcement is tests/e2e's."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from images.prediction import PredictionRecord
from images.records import Claimed
from scripts import fill_iam
from scripts.fill_iam import PolicyError, fill
from tests.conftest import Buckets
from tests.support.records import BlockingRecords, storage_of

IAM = Path(__file__).resolve().parents[2] / "iam"
RUNNERS = ["model-runner.json", "model-runner.tigris.json"]
POLICIES = [*RUNNERS, "model-publisher.json"]


def policy(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((IAM / name).read_text(encoding="utf-8"))
    return document


def allowed(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (action, resource)
        for statement in document["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }


@pytest.mark.parametrize("name", RUNNERS)
def test_a_runner_may_read_models_read_and_write_images_and_list_predictions_alone(
    name: str,
) -> None:
    assert allowed(policy(name)) == {
        ("s3:GetObject", "arn:aws:s3:::model-storage/*"),
        ("s3:GetObject", "arn:aws:s3:::generated-images/*"),
        ("s3:PutObject", "arn:aws:s3:::generated-images/*"),
        ("s3:ListBucket", "arn:aws:s3:::generated-images"),
    }


def listed_prefixes(document: dict[str, Any]) -> list[str]:
    (patterns,) = [
        statement["Condition"]["StringLike"]["s3:prefix"]
        for statement in document["Statement"]
        if statement["Action"] == ["s3:ListBucket"]
    ]
    return list(patterns)


@pytest.mark.parametrize(
    ("image_prefix", "prefix", "may_list"),
    [
        (None, "predictions/by-time/", True),
        (None, "predictions/a-cat.json", True),
        (None, "team/predictions/by-time/", True),
        (None, "", False),
        (None, "2026/11/", False),
        (None, "team/2026/11/", False),
        (None, "mypredictions/", False),
        ("team/", "team/predictions/by-time/", True),
        ("team/", "predictions/by-time/", False),
        ("team/", "other/predictions/by-time/", False),
        ("team/", "team/2026/11/", False),
    ],
)
def test_what_a_runner_lists_is_predictions_and_no_images(
    image_prefix: str | None, prefix: str, may_list: bool
) -> None:
    filled = fill(
        policy("model-runner.json"),
        model_bucket="my-models",
        image_bucket="my-images",
        image_prefix=image_prefix,
    )

    # IAM's StringLike: * is any text, slashes included, and letters are compared as they are.
    assert any(fnmatchcase(prefix, pattern) for pattern in listed_prefixes(filled)) == may_list


@pytest.mark.parametrize("prefix", ["", "team/a"])
def test_the_policy_lets_a_runner_list_what_the_records_list(
    s3: EmbeddedS3, admin: Any, buckets: Buckets, prefix: str
) -> None:
    filled = fill(
        policy("model-runner.json"),
        model_bucket=buckets.models,
        image_bucket=buckets.images,
        image_prefix=prefix,
    )
    keys = s3.create_user(f"{buckets.images}-runner", filled)
    store = BlockingRecords(storage_of(s3, keys), buckets.images, prefix)
    claimed = store.claim(PredictionRecord.of("a-cat", {}, created_at=datetime.now(UTC)))
    assert isinstance(claimed, Claimed)
    store.enter(claimed.record)

    assert [stored.record.id for stored in store.recent(5).stored] == ["a-cat"]
    assert store.get("nobody") is None
    # The embedded server does not look at conditions, so what was listed is compared here.
    assert fnmatchcase(f"{store.prefix}/by-time/", listed_prefixes(filled)[0])


def test_a_publisher_may_not_delete_and_knows_nothing_of_images() -> None:
    found = allowed(policy("model-publisher.json"))

    assert not [action for action, _ in found if "Delete" in action or "*" in action]
    assert {resource for _, resource in found} == {
        "arn:aws:s3:::model-storage",
        "arn:aws:s3:::model-storage/*",
    }


def test_the_policy_for_tigris_is_the_one_for_aws_without_its_conditions() -> None:
    aws, tigris = (policy(name) for name in RUNNERS)

    assert not [statement for statement in tigris["Statement"] if "Condition" in statement]
    for statement in aws["Statement"]:
        condition = statement.pop("Condition")
        assert condition.pop("Bool") == {"aws:SecureTransport": "true"}
        assert not condition or statement["Sid"] == "ListPredictions"
    assert tigris == aws


@pytest.mark.parametrize("name", POLICIES)
def test_filling_names_every_bucket_and_leaves_the_original_alone(name: str) -> None:
    original = policy(name)

    filled = fill(original, model_bucket="my-models", image_bucket="my-images")

    assert original == policy(name)
    text = json.dumps(filled)
    assert "model-storage" not in text
    assert "generated-images" not in text
    assert "arn:aws:s3:::my-models/*" in text


def test_a_policy_can_be_narrowed_to_one_model_and_one_image_prefix() -> None:
    filled = fill(
        policy("model-runner.json"),
        model_bucket="my-models",
        image_bucket="my-images",
        model_path="ByteDance/SDXL-Lightning",
        image_prefix="team/",
    )

    assert {resource for _, resource in allowed(filled)} == {
        "arn:aws:s3:::my-models/ByteDance/SDXL-Lightning/*",
        "arn:aws:s3:::my-images/team/*",
        "arn:aws:s3:::my-images",
    }
    assert listed_prefixes(filled) == ["team/predictions/*"]


@pytest.mark.parametrize(
    "name",
    [
        "ab",
        "a" * 64,
        "Upper",
        "under_score",
        "-start",
        "end-",
        "two..dots",
        "10.0.0.1",
        "a/b",
        "a*b",
    ],
)
def test_what_is_not_a_bucket_name_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="is not a bucket name"):
        fill(policy("model-runner.json"), model_bucket=name, image_bucket="my-images")


def test_one_bucket_for_both_is_refused() -> None:
    with pytest.raises(PolicyError, match="cannot share the bucket"):
        fill(policy("model-runner.json"), model_bucket="same", image_bucket="same")


@pytest.mark.parametrize("path", ["*", "a/*", "a/../b", "a//b", "${aws:username}", "a?"])
def test_a_path_that_a_policy_would_widen_is_refused(path: str) -> None:
    with pytest.raises(PolicyError, match="is not a path"):
        fill(
            policy("model-runner.json"),
            model_bucket="my-models",
            image_bucket="my-images",
            model_path=path,
        )


def test_the_command_prints_the_policy_or_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--model-bucket", "my-models", "--image-bucket", "my-images"]
    assert fill_iam.main(names) == 0
    printed = json.loads(capsys.readouterr().out)

    assert fill_iam.main([*names, "--output", str(tmp_path / "policy.json")]) == 0

    assert json.loads((tmp_path / "policy.json").read_text()) == printed


def test_the_command_says_what_is_wrong_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fill_iam.main(["--model-bucket", "No"]) == 2

    assert "'No' is not a bucket name" in capsys.readouterr().err
