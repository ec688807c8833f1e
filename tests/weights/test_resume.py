"""An upload that was cut off is taken up where it stopped, and what nobody will finish is put away."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, RECIPE, publish_folder
from tests.weights.test_publish import UNET
from weights import BucketError, find_snapshot, plan_publication, publish
from weights.pull import verify
from weights.unfinished import abort_leftovers, unfinished_uploads
from weights.upload import PART_SIZE

PARTS = 3  # of large_model's 66 MiB


def begin(bucket, key, **options):
    """An upload as a run that was killed leaves it."""
    answer = bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key, **options)
    return answer["UploadId"]


def send(bucket, key, upload_id, number, data):
    bucket.client.upload_part(
        Bucket=bucket.name, Key=key, UploadId=upload_id, PartNumber=number, Body=data
    )


def part(folder, number):
    return (folder / UNET).read_bytes()[(number - 1) * PART_SIZE : number * PART_SIZE]


def parts_sent(s3, bucket):
    return [
        record
        for record in s3.requests(bucket.name)
        if record.method == "PUT" and "partNumber" in record.query
    ]


def unfinished(bucket):
    return [upload.key for upload in unfinished_uploads(bucket, "")]


@pytest.fixture
def cut_off(bucket, large_model):
    """The plan of a publication, whose upload has its parts 1 and 3 in the bucket."""
    publication = plan_publication(large_model, bucket, MODEL, RECIPE)
    key = publication.key(UNET)
    digest = next(entry.sha256 for entry in publication.files if entry.path == UNET)
    upload_id = begin(bucket, key, Metadata={"sha256": digest})
    for number in (1, PARTS):
        send(bucket, key, upload_id, number, part(large_model, number))
    return publication


def test_only_the_parts_that_are_missing_are_sent(s3, bucket, cut_off):
    s3.forget_requests()
    sent = []

    publish(cut_off, on_bytes=sent.append)

    assert [record.request_bytes for record in parts_sent(s3, bucket)] == [PART_SIZE]
    assert sum(sent) == cut_off.upload_bytes  # a part that is there counts as done
    assert unfinished(bucket) == []
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_part_with_other_bytes_is_sent_again(s3, bucket, large_model, cut_off):
    (upload,) = unfinished_uploads(bucket, cut_off.key(UNET))
    send(bucket, upload.key, upload.upload_id, 1, bytes(PART_SIZE))
    s3.forget_requests()

    publish(cut_off)

    assert len(parts_sent(s3, bucket)) == 2
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_an_upload_that_another_tool_began_is_not_left_without_its_sha256(bucket, large_model):
    publication = plan_publication(large_model, bucket, MODEL, RECIPE)
    begin(bucket, publication.key(UNET))

    publish(publication)

    assert plan_publication(large_model, bucket, MODEL, RECIPE).unchanged
    assert unfinished(bucket) == []


def test_of_several_the_one_with_the_most_parts_is_taken_up_and_the_others_put_away(
    s3, bucket, cut_off
):
    begin(bucket, cut_off.key(UNET))
    s3.forget_requests()

    publish(cut_off)

    assert len(parts_sent(s3, bucket)) == 1
    assert unfinished(bucket) == []


def test_without_the_right_to_list_parts_all_are_sent_with_one_warning(
    s3, bucket, bucket_for, large_model, cut_off, caplog
):
    statements = [
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
            "Resource": f"arn:aws:s3:::{bucket.name}/*",
        },
        {
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": f"arn:aws:s3:::{bucket.name}",
        },
    ]
    writer = s3.create_user(
        f"writer-of-{bucket.name}", {"Version": "2012-10-17", "Statement": statements}
    )
    limited = bucket_for(bucket.name, writer)
    s3.forget_requests()

    with caplog.at_level(logging.WARNING):
        publish_folder(limited, large_model)

    assert len(parts_sent(s3, bucket)) == PARTS
    warnings = [record for record in caplog.records if "sent again" in record.message]
    assert len(warnings) == 1
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_connection_that_breaks_leaves_the_parts_for_the_next_run(s3, bucket, large_model):
    broken = Fault(
        kind="status", status=400, method="PUT", bucket=bucket.name, key=f"*/{UNET}", skip=2
    )
    with s3.fault(broken), pytest.raises(BucketError, match=UNET):
        publish(plan_publication(large_model, bucket, MODEL, RECIPE), jobs=1)
    assert len(unfinished(bucket)) == 1
    s3.forget_requests()

    publish_folder(bucket, large_model)

    assert len(parts_sent(s3, bucket)) == 1
    assert unfinished(bucket) == []


def test_an_upload_that_somebody_aborts_midway_is_begun_anew(s3, bucket, large_model):
    publication = plan_publication(large_model, bucket, MODEL, RECIPE)
    key = publication.key(UNET)
    aborted = []

    def abort_once(_count: int) -> None:
        for upload in unfinished_uploads(bucket, key) if not aborted else ():
            bucket.client.abort_multipart_upload(
                Bucket=bucket.name, Key=key, UploadId=upload.upload_id
            )
            aborted.append(upload)

    publish(publication, jobs=1, on_bytes=abort_once)

    assert aborted
    assert unfinished(bucket) == []
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_a_run_that_is_in_the_middle_of_another_version_is_left_alone(bucket, own_model):
    publish_folder(bucket, own_model)
    alive = f"{MODEL}/{'a' * 32}/{UNET}"
    begin(bucket, alive)

    publish_folder(bucket, own_model, RECIPE | {"steps": [8]})

    assert unfinished(bucket) == [alive]


def test_what_has_been_silent_is_put_away_and_only_of_this_model(bucket):
    others = [f"{MODEL}/other/{'a' * 32}/x", f"{MODEL}2/{'a' * 32}/x", f"{MODEL}/notes/x"]
    for key in [*others, f"{MODEL}/{'a' * 32}/x"]:
        begin(bucket, key)

    aborted = abort_leftovers(bucket, MODEL, silence=timedelta(0) - timedelta(minutes=1))

    assert aborted == 1
    assert sorted(unfinished(bucket)) == sorted(others)
