"""Two owners who publish at once: neither spoils the other's version, and who was overtaken is told."""

from __future__ import annotations

import threading

import pytest
from botocore.stub import Stubber

from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, RECIPE, publish_folder
from tests.weights.test_publish import UNET
from weights import activate, find_snapshot, plan_publication, publish, read_latest
from weights.activation import succeed
from weights.errors import BucketError, OvertakenError
from weights.pull import verify
from weights.unfinished import unfinished_uploads

OTHER = RECIPE | {"steps": [8]}


def at_once(*publications) -> list[BaseException | None]:
    """Carry the plans out at the same time; what each of them raised."""
    ends: list[BaseException | None] = [None] * len(publications)
    together = threading.Barrier(len(publications))

    def run(place: int) -> None:
        together.wait()
        try:
            publish(publications[place])
        except Exception as error:  # noqa: BLE001 - what it is, the test judges
            ends[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(publications))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_the_same_content_succeeds_for_both(bucket, bucket_for, large_model):
    plans = [
        plan_publication(large_model, place, MODEL, RECIPE)
        for place in (bucket, bucket_for(bucket.name))
    ]

    assert at_once(*plans) == [None, None]

    assert read_latest(bucket, MODEL) == plans[0].version == plans[1].version
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()
    assert list(unfinished_uploads(bucket, "")) == []


def test_one_who_completes_what_both_are_sending_has_done_it_for_both(s3, bucket, large_model):
    first, second = (plan_publication(large_model, bucket, MODEL, RECIPE) for _ in range(2))
    s3.inject(
        Fault(kind="hold", method="PUT", bucket=bucket.name, key=f"*/{UNET}", skip=1, times=1)
    )
    slow = threading.Thread(target=publish, args=(first,))
    slow.start()
    s3.wait_for_held_request()
    fast = threading.Thread(target=publish, args=(second,))
    fast.start()
    fast.join()
    s3.clear_faults()
    slow.join()

    assert plan_publication(large_model, bucket, MODEL, RECIPE).unchanged
    assert list(unfinished_uploads(bucket, "")) == []
    assert verify(bucket, find_snapshot(bucket, MODEL)).problems == ()


def test_different_content_is_whole_twice_and_one_is_served(bucket, large_model, own_model):
    plans = [
        plan_publication(large_model, bucket, MODEL, RECIPE),
        plan_publication(own_model, bucket, MODEL, RECIPE),
    ]

    ends = at_once(*plans)

    served = read_latest(bucket, MODEL)
    assert served in {plan.version for plan in plans}
    for plan, end in zip(plans, ends, strict=True):
        assert verify(bucket, find_snapshot(bucket, MODEL, plan.version)).problems == ()
        assert isinstance(end, OvertakenError) == (plan.version != served)


def test_who_is_overtaken_is_told_by_which_version_and_how_to_insist(bucket, model):
    before = publish_folder(bucket, model, RECIPE | {"steps": [1]})
    mine = plan_publication(model, bucket, MODEL, RECIPE)
    theirs = publish_folder(bucket, model, OTHER)

    with pytest.raises(OvertakenError) as caught:
        publish(mine)

    said = str(caught.value)
    assert f"latest.json named {before.version}" in said
    assert f"has made it name {theirs.version}" in said
    assert f"python -m weights activate {MODEL} {mine.version}" in said
    assert read_latest(bucket, MODEL) == theirs.version
    activate(bucket, MODEL, mine.version)
    assert read_latest(bucket, MODEL) == mine.version


def test_the_server_compares_once_more_as_it_writes(s3, bucket, model):
    """Between the last look and the write, too, somebody else may be faster."""
    theirs = publish_folder(bucket, model, OTHER)
    mine = plan_publication(model, bucket, MODEL, RECIPE)
    third = publish_folder(bucket, model, RECIPE | {"steps": [1]})
    activate(bucket, MODEL, theirs.version)
    s3.inject(Fault(kind="hold", method="PUT", bucket=bucket.name, key="*/latest.json", times=1))
    caught = []

    def run() -> None:
        try:
            publish(mine)
        except OvertakenError as error:
            caught.append(error)

    slow = threading.Thread(target=run)
    slow.start()
    s3.wait_for_held_request()
    activate(bucket, MODEL, third.version)
    s3.clear_faults()
    slow.join()

    assert f"has made it name {third.version}" in str(caught[0])
    assert read_latest(bucket, MODEL) == third.version


def test_a_latest_that_already_names_the_version_is_left_alone(s3, bucket, model):
    mine, theirs = (plan_publication(model, bucket, MODEL, RECIPE) for _ in range(2))
    publish(theirs)
    s3.forget_requests()

    publish(mine)

    written = [record.key for record in s3.requests(bucket.name) if record.method == "PUT"]
    assert f"{MODEL}/latest.json" not in written


@pytest.mark.parametrize("code", ["NotImplemented", "InvalidArgument"])
def test_a_server_that_knows_no_conditions_is_written_to_without(bucket, published, code):
    bucket.put(f"{MODEL}/latest.json", b"broken", content_type="application/json")
    with Stubber(bucket.client) as server:
        server.add_client_error("put_object", code, http_status_code=501)
        server.add_response("put_object", {})
        succeed(bucket, MODEL, published.version, None)
        server.assert_no_pending_responses()


def test_a_refusal_to_write_latest_is_a_failure(s3, bucket, model):
    refusal = Fault(kind="status", status=403, method="PUT", bucket=bucket.name, key="*latest.json")
    with s3.fault(refusal), pytest.raises(BucketError, match="may not do that"):
        publish_folder(bucket, model)
