"""A model that lies in a Google Cloud Storage bucket: read by everyone, by an HMAC keypair, by a service account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preparation import PreparationError, Progress, Request, UsageError, make_plan, prepare
from preparation.assemble import Prepared
from preparation.patterns import Patterns
from settings import load_source_settings
from tests.preparation.conftest import Models, Ran
from tests.preparation.sources import REWRITTEN, files_of, published_files
from tests.support.gcs import PAGE_SIZE, LoopbackGcs
from weights import Bucket, find_snapshot

ACCOUNT = "reader@loopback.iam.gserviceaccount.com"
HMAC_ID, HMAC_SECRET = "GOOG1ELOOPBACK", "a-secret-of-a-reader"
HMAC = {"SOURCE_AWS_ACCESS_KEY_ID": HMAC_ID, "SOURCE_AWS_SECRET_ACCESS_KEY": HMAC_SECRET}
RunFrom = Callable[..., Prepared]


@pytest.fixture
def gcs(models: Models) -> Iterator[LoopbackGcs]:
    """A public bucket, and a private one that a service account and an HMAC keypair may read."""
    with LoopbackGcs() as server:
        server.hmac_keys[HMAC_ID] = HMAC_SECRET
        server.add("public-models", models.full, "sdxl", readers={"*"})
        server.add("private-models", models.full, "team/sdxl", readers={ACCOUNT, HMAC_ID})
        yield server


@pytest.fixture
def run_from(gcs: LoopbackGcs, tmp_path: Path, quiet: Progress) -> RunFrom:
    """Plan and prepare a gs:// source with these variables; keyword arguments are those of `Request`."""

    def prepared(source: str, variables: dict[str, str] | None = None, **options: Any) -> Prepared:
        access = load_source_settings({"STORAGE_EMULATOR_HOST": gcs.host, **(variables or {})})
        defaults = {"access": access, "folder": tmp_path / "prepared", "name": "me/model"}
        request = Request(source, **{**defaults, **options})
        return prepare(request, make_plan(request), quiet)

    return prepared


def _assert_is(folder: Path, expected: Path) -> None:
    found = {path: data for path, data in files_of(folder).items() if not path.startswith(".")}
    origin = files_of(expected)
    assert found.keys() == origin.keys()
    for path in origin.keys() - REWRITTEN:
        assert found[path] == origin[path], path


def test_public_bucket_is_read_without_keys_page_by_page(
    run_from: RunFrom, gcs: LoopbackGcs, models: Models
) -> None:
    _assert_is(run_from("gs://public-models/sdxl").folder, models.full)
    assert {request.caller for request in gcs.requests} == {None}
    pages = [request for request in gcs.requests if "list-type" in request.query]
    assert len(pages) == -(-len(files_of(models.full)) // PAGE_SIZE) > 1


def test_service_account_reads_a_private_bucket_all_the_way_to_the_published_model(
    command: Callable[..., Ran], gcs: LoopbackGcs, bucket: Bucket, models: Models, tmp_path: Path
) -> None:
    key = gcs.add_account(ACCOUNT, tmp_path / "service_account.json")
    ran = command(
        *("gs://private-models/team/sdxl", bucket.name, "--name", "me/model"),
        STORAGE_EMULATOR_HOST=f"http://{gcs.host}",
        GOOGLE_APPLICATION_CREDENTIALS=str(key),
    )
    assert ran.code == 0, ran.err
    expected, published = files_of(models.full), published_files(bucket, "me/model")
    assert published.keys() == expected.keys()
    for path in expected.keys() - REWRITTEN:
        assert published[path] == expected[path], path
    source = (find_snapshot(bucket, "me/model").recipe or {})["source"]
    assert source["repo"] == "gs://private-models/team/sdxl"
    assert len(gcs.tokens) == 1
    assert next(iter(gcs.tokens)) not in ran.out + ran.err
    assert {request.caller for request in gcs.requests if request.path != "/token"} == {ACCOUNT}


def test_hmac_keypair_reads_a_private_bucket(
    run_from: RunFrom, gcs: LoopbackGcs, models: Models
) -> None:
    _assert_is(run_from("gs://private-models/team/sdxl", HMAC).folder, models.full)
    assert {request.caller for request in gcs.requests} == {HMAC_ID}


def test_keys_of_another_server_are_not_sent_to_google(run_from: RunFrom, gcs: LoopbackGcs) -> None:
    elsewhere = {"AWS_ACCESS_KEY_ID": "tid_publisher", "AWS_SECRET_ACCESS_KEY": "tsec_publisher"}
    source = {
        "SOURCE_AWS_ACCESS_KEY_ID": "AKIA",
        "SOURCE_AWS_SECRET_ACCESS_KEY": "of AWS".replace(" ", ""),
    }
    run_from("gs://public-models/sdxl", {**elsewhere, **source})
    assert {request.caller for request in gcs.requests} == {None}


def test_second_run_asks_for_the_listing_alone(run_from: RunFrom, gcs: LoopbackGcs) -> None:
    run_from("gs://public-models/sdxl")
    gcs.requests.clear()
    run_from("gs://public-models/sdxl", name="another/model")
    assert not any(request.range for request in gcs.requests)


def test_patterns_narrow_it(run_from: RunFrom, gcs: LoopbackGcs, models: Models) -> None:
    gcs.add("base", models.base, "sdxl", readers={"*"})
    plain = Patterns(ignore=("*.fp16.*",))
    assert run_from("gs://base/sdxl", patterns=plain).recipe.dtype == "float32"
    assert not any(".fp16." in request.path for request in gcs.requests)


def test_object_that_changed_since_it_was_listed_is_refused(
    gcs: LoopbackGcs, tmp_path: Path, quiet: Progress
) -> None:
    access = load_source_settings({"STORAGE_EMULATOR_HOST": gcs.host})
    source = "gs://public-models/sdxl"
    request = Request(source, name="me/model", access=access, folder=tmp_path / "prepared")
    plan = make_plan(request)
    name = "sdxl/vae/diffusion_pytorch_model.safetensors"
    gcs.buckets["public-models"].contents[name] += b"more"
    with pytest.raises(PreparationError, match=rf"{source}/vae/.*replaced since it was listed"):
        prepare(request, plan, quiet)


@pytest.mark.parametrize(
    ("source", "variables", "message"),
    [
        ("gs://no-such-bucket/sdxl", {}, "gs://no-such-bucket/sdxl: the bucket does not exist"),
        (
            "gs://private-models/team/sdxl",
            {},
            "access was denied to anonymous callers. Set GOOGLE_APPLICATION_CREDENTIALS",
        ),
        (
            "gs://private-models/team/sdxl",
            {**HMAC, "SOURCE_AWS_SECRET_ACCESS_KEY": "another"},
            "does not accept SOURCE_AWS_ACCESS_KEY_ID",
        ),
        ("gs://public-models/other", {}, "nothing under gs://public-models/other/. .* holds sdxl/"),
        (
            "gs://public-models/sdxl",
            {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such/key.json"},
            "/no/such/key.json, which cannot be used",
        ),
    ],
)
def test_mistake_is_named_with_what_to_do(
    run_from: RunFrom, source: str, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_from(source, variables)


def test_service_account_that_may_not_read_the_bucket_is_named(
    run_from: RunFrom, gcs: LoopbackGcs, tmp_path: Path
) -> None:
    key = gcs.add_account("other@loopback.iam.gserviceaccount.com", tmp_path / "key.json")
    with pytest.raises(UsageError, match="access was denied to GOOGLE_APPLICATION_CREDENTIALS"):
        run_from("gs://private-models/team/sdxl", {"GOOGLE_APPLICATION_CREDENTIALS": str(key)})


def test_key_that_was_deleted_is_refused_with_its_file_named(
    run_from: RunFrom, gcs: LoopbackGcs, tmp_path: Path
) -> None:
    key = gcs.add_account(ACCOUNT, tmp_path / "key.json")
    gcs.accounts.clear()
    with pytest.raises(UsageError, match=rf"token for {key}: Google refuses it"):
        run_from("gs://private-models/team/sdxl", {"GOOGLE_APPLICATION_CREDENTIALS": str(key)})


def test_google_that_cannot_be_reached_is_a_failure(run_from: RunFrom) -> None:
    with LoopbackGcs() as gone:
        host = gone.host
    with pytest.raises(PreparationError, match="could not be reached") as raised:
        run_from("gs://public-models/sdxl", {"STORAGE_EMULATOR_HOST": host})
    assert raised.value.exit_code == 1
