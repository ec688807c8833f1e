"""What the restricted keypair of iam/model-runner.json may do, and all that it may not, under enforced IAM."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.e2e.conftest import MODEL, TUTORIAL_INPUT, Deployment, image_urls, version_of
from tests.support.cog_server import CogServer


@pytest.fixture(scope="module")
def workload(deployment: Deployment) -> Any:
    """A client with the restricted keypair."""
    return deployment.s3.client(deployment.workload)


def refused(call: Any, **arguments: Any) -> None:
    with pytest.raises(ClientError) as error:
        call(**arguments)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_setup_and_predictions_work_with_the_restricted_keypair_alone(server, deployment):
    deployment.s3.forget_requests()
    image_urls(server.predict(TUTORIAL_INPUT))
    used = deployment.s3.requests(deployment.images)
    assert {record.access_key_id for record in used} == {deployment.workload.access_key_id}


def test_setup_asks_for_objects_and_never_lists(s3, deployment):
    s3.forget_requests()
    with CogServer(deployment.environment()) as own_server:
        assert own_server.health()["status"] == "READY", own_server.tail()

    calls = [record for record in s3.requests(deployment.models) if record.access_key_id]
    assert {record.access_key_id for record in calls} == {deployment.workload.access_key_id}
    assert {record.method for record in calls} == {"GET"}
    assert all(record.key.startswith(f"{MODEL}/") for record in calls)


def test_reading_the_model_is_allowed(workload, deployment):
    key = f"{MODEL}/{version_of(deployment)}/manifest.json"
    assert workload.get_object(Bucket=deployment.models, Key=key)


def test_another_bucket_cannot_be_read(workload, deployment, new_bucket, admin):
    other = new_bucket()
    admin.put_object(Bucket=other, Key="secret", Body=b"x")
    refused(workload.get_object, Bucket=other, Key="secret")


def test_another_prefix_cannot_be_read_when_the_policy_names_one(s3, deployment, admin):
    import json

    from scripts.fill_iam import POLICIES, fill

    policy = json.loads((POLICIES / "model-runner.json").read_text())
    narrow = fill(
        policy, model_bucket=deployment.models, image_bucket=deployment.images, model_path=MODEL
    )
    client = s3.client(s3.create_user("narrow-workload", narrow))
    admin.put_object(Bucket=deployment.models, Key="other/model/weights", Body=b"x")

    assert client.get_object(Bucket=deployment.models, Key=f"{MODEL}/latest.json")
    refused(client.get_object, Bucket=deployment.models, Key="other/model/weights")


def test_the_model_bucket_cannot_be_written(workload, deployment):
    refused(workload.put_object, Bucket=deployment.models, Key=f"{MODEL}/latest.json", Body=b"{}")
    refused(workload.put_object, Bucket=deployment.models, Key="new", Body=b"x")


@pytest.mark.parametrize("which", ["models", "images"])
def test_nothing_can_be_deleted(workload, deployment, which):
    bucket = getattr(deployment, which)
    refused(workload.delete_object, Bucket=bucket, Key=f"{MODEL}/latest.json")


def test_models_cannot_be_listed(workload, deployment):
    # Of images, predictions alone can; the embedded server knows no conditions, so tests/packaging/test_iam.py
    # holds the policy to that.
    refused(workload.list_objects_v2, Bucket=deployment.models)
    assert workload.list_objects_v2(Bucket=deployment.images, Prefix="predictions/")
    refused(workload.list_objects_v2, Bucket=deployment.models, Prefix=MODEL)
