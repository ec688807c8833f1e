"""What is written is read back whole, lists are in order, and a refusal says what boto3's would say."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from botocore import exceptions as botocore_errors
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from demo.s3 import EmbeddedS3, Keypair
from s3 import error_code, explain
from s3.async_client import (
    LARGEST_HASHED_HERE,
    USER_AGENT,
    Answer,
    AsyncClient,
    Listing,
    S3Error,
    _listing,
)
from settings import StorageSettings
from tests.support.fault_proxy import FaultProxy, ProxyRequest
from tests.support.faults import Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.support.records import storage_of

# All that S3 takes but the newline, which the embedded server does not find again.
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=40)
ODD_KEYS = (
    "!$&'()*,;=:@[]\\^`{|}\"<>",
    "%2F and 100%25",
    "/leading//and trailing/",
    "?q=a&b#c",
    "\x00\x01\x1f\x7f",
    "a b+c",
    "a/../b/./c",
    "~-_.",
    "é/漢字/😀",
    "\ufffe",
)
NOBODY = Keypair("tid_nobody", "hunter2")

Got = TypeVar("Got")


@pytest.fixture
def storage(s3: EmbeddedS3) -> StorageSettings:
    return storage_of(s3)


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    return new_bucket()


@pytest.fixture(scope="module")
def shared_bucket(s3: EmbeddedS3) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(name)
    return name


def with_client(
    storage: StorageSettings, work: Callable[[AsyncClient], Awaitable[Got]], **options: Any
) -> Got:
    """What `work` comes to with a client that is closed afterwards, on an event loop of its own."""

    async def run() -> Got:
        async with AsyncClient(storage, **options) as client:
            return await work(client)

    return asyncio.run(run())


def put(storage: StorageSettings, bucket: str, key: str, data: bytes, **headers: str) -> str:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return with_client(storage, lambda client: client.put(bucket, key, data, given))


def get(
    storage: StorageSettings, bucket: str, key: str, limit: int = 1000, **options: Any
) -> Answer:
    return with_client(storage, lambda client: client.get(bucket, key, limit=limit), **options)


def listed(
    storage: StorageSettings, bucket: str, prefix: str = "", *, after: str = "", limit: int = 1000
) -> Listing:
    return with_client(
        storage, lambda client: client.list_keys(bucket, prefix, after=after, limit=limit)
    )


# Objects


@hypothesis_settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(key=KEYS, data=st.binary(max_size=100))
@example(key="".join(ODD_KEYS), data=b"content")
@example(key="/leading//../and/./trailing/", data=b"")
@example(key="..", data=b"")
def test_any_key_is_written_and_read_where_a_server_checks_the_signature(
    s3: EmbeddedS3, shared_bucket: str, key: str, data: bytes
) -> None:
    async def write_and_read(client: AsyncClient) -> Answer:
        await client.put(shared_bucket, key, data, {"Content-Type": "application/json"})
        return await client.get(shared_bucket, key, limit=100)

    answer = with_client(storage_of(s3), write_and_read)

    assert answer.body == data
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "size", [0, LARGEST_HASHED_HERE, LARGEST_HASHED_HERE + 1, 3 * 1024 * 1024], ids=str
)
def test_a_body_of_any_size_is_stored_whole(
    storage: StorageSettings, bucket: str, admin: Any, size: int
) -> None:
    data = os.urandom(size)

    put(storage, bucket, "key", data)

    assert admin.get_object(Bucket=bucket, Key="key")["Body"].read() == data


def test_a_write_returns_the_etag_that_others_are_told(
    storage: StorageSettings, bucket: str, admin: Any
) -> None:
    etag = put(storage, bucket, "key", b"content")

    assert etag == admin.head_object(Bucket=bucket, Key="key")["ETag"]
    assert get(storage, bucket, "key").headers["ETAG"] == etag


def test_a_write_that_is_told_no_etag_is_an_error(s3: EmbeddedS3, bucket: str) -> None:
    with FaultProxy(s3.endpoint_url, lambda _: Fault(FaultKind.NO_ETAG)) as proxy:
        storage = storage_of(s3).model_copy(update={"endpoint_url": proxy.endpoint_url})
        with pytest.raises(S3Error, match="the answer has no ETag"):
            put(storage, bucket, "key", b"content")


def test_what_is_there_is_not_created_again(storage: StorageSettings, bucket: str) -> None:
    put(storage, bucket, "key", b"first", If_None_Match="*")

    with pytest.raises(S3Error, match="changed meanwhile") as caught:
        put(storage, bucket, "key", b"second", If_None_Match="*")

    assert caught.value.code == "PreconditionFailed"
    assert get(storage, bucket, "key").body == b"first"


def test_what_has_changed_is_not_replaced(storage: StorageSettings, bucket: str) -> None:
    first = put(storage, bucket, "key", b"first")
    put(storage, bucket, "key", b"second", If_Match=first)

    with pytest.raises(S3Error) as caught:
        put(storage, bucket, "key", b"third", If_Match=first)

    assert caught.value.code == "PreconditionFailed"
    assert get(storage, bucket, "key").body == b"second"


def test_an_object_is_read_up_to_the_limit_and_no_further(
    storage: StorageSettings, bucket: str
) -> None:
    put(storage, bucket, "key", b"0123456789")

    assert get(storage, bucket, "key", limit=10).body == b"0123456789"
    with pytest.raises(S3Error, match="it has 10 bytes, and 9 are the most") as caught:
        get(storage, bucket, "key", limit=9)

    assert caught.value.code == "EntityTooLarge"


def test_a_bucket_in_the_host_name_is_asked_for_there(
    s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "key").write_bytes(b"content")
    resolve = socket.getaddrinfo  # where a provider has a wildcard name, loopback has none
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, *rest, **more: resolve(host.removeprefix("bucket."), *rest, **more),
    )

    with ObjectServer(tmp_path, require_bucket_host=True) as server:
        changed = {"endpoint_url": f"http://localhost:{server.port}", "addressing_style": "virtual"}
        storage = storage_of(s3).model_copy(update=changed)
        assert get(storage, "bucket", "key").body == b"content"


def test_a_request_says_whose_it_is_and_does_not_sign_that(s3: EmbeddedS3, bucket: str) -> None:
    requests: list[ProxyRequest] = []

    with FaultProxy(s3.endpoint_url, requests.append) as proxy:
        storage = storage_of(s3).model_copy(update={"endpoint_url": proxy.endpoint_url})
        put(storage, bucket, "key", b"content")

    (told,) = ({name.lower(): value for name, value in asked.headers.items()} for asked in requests)
    assert told["user-agent"] == USER_AGENT
    assert "x-amz-date" in told["authorization"]
    assert "user-agent" not in told["authorization"]


def test_uvloop_runs_it_as_well(storage: StorageSettings, bucket: str) -> None:
    async def write_read_and_list() -> tuple[bytes, Listing]:
        async with AsyncClient(storage) as client:
            await client.put(bucket, "key", b"content", {})
            answer = await client.get(bucket, "key", limit=100)
            return answer.body, await client.list_keys(bucket, "", after="", limit=10)

    body, listing = uvloop.run(write_read_and_list())

    assert body == b"content"
    assert listing == Listing(("key",), is_truncated=False)


# Lists


def test_a_list_has_the_keys_under_the_prefix_in_their_order(
    storage: StorageSettings, bucket: str, admin: Any
) -> None:
    for key in ("b/2", "a/1", "b/10", "b/1", "c"):
        admin.put_object(Bucket=bucket, Key=key)

    assert listed(storage, bucket, "b/") == Listing(("b/1", "b/10", "b/2"), is_truncated=False)
    assert listed(storage, bucket, "d") == Listing((), is_truncated=False)


def test_pages_follow_each_other_without_gap_or_repetition(
    storage: StorageSettings, bucket: str, admin: Any
) -> None:
    keys = [f"{number} of 5" for number in range(5)]
    for key in keys:
        admin.put_object(Bucket=bucket, Key=key)

    async def all_pages(client: AsyncClient) -> list[Listing]:
        pages = [await client.list_keys(bucket, "", after="", limit=2)]
        while pages[-1].is_truncated:
            after = pages[-1].keys[-1]
            pages.append(await client.list_keys(bucket, "", after=after, limit=2))
        return pages

    pages = with_client(storage, all_pages)

    assert [len(page.keys) for page in pages] == [2, 2, 1]
    assert [key for page in pages for key in page.keys] == keys


def test_keys_that_xml_cannot_express_are_listed_as_they_are(
    storage: StorageSettings, bucket: str, admin: Any
) -> None:
    for key in ODD_KEYS:
        put(storage, bucket, key, b"")

    assert listed(storage, bucket).keys == tuple(sorted(ODD_KEYS))


@pytest.mark.parametrize("start", ["a b+c", "é&%25/", "?x=1&prefix=y#", "//"])
def test_any_prefix_and_any_key_to_start_after_are_asked_for_as_they_are(
    storage: StorageSettings, bucket: str, start: str
) -> None:
    for key in (f"{start}1", f"{start}2", f"{start}3", "elsewhere"):
        put(storage, bucket, key, b"")

    found = listed(storage, bucket, start, after=f"{start}1", limit=1)

    assert found == Listing((f"{start}2",), is_truncated=True)


@pytest.mark.parametrize(
    "document",
    [b"", b"Sign in to this network", b"\xff\xfe", b"<ListBucketResult><Contents>",
     b"<html><body/></html>", b'<?xml version="1.0" encoding="utf-9"?><ListBucketResult/>'],
)  # fmt: skip
def test_what_is_no_list_is_said_with_what_to_check(document: bytes) -> None:
    with pytest.raises(S3Error, match=r"no list of objects\. Check AWS_ENDPOINT_URL_S3"):
        _listing(document)


@pytest.mark.parametrize(
    ("encoding", "key"), [("", "a+b%20c&amp;é"), ("url", "a%2Bb%2520c%26%C3%A9")]
)
def test_keys_are_decoded_only_where_the_server_has_encoded_them(encoding: str, key: str) -> None:
    told = f"<EncodingType>{encoding}</EncodingType>" if encoding else ""
    document = f"<ListBucketResult>{told}<Contents><Key>{key}</Key></Contents></ListBucketResult>"

    assert _listing(document.encode()).keys == ("a+b%20c&é",)


# Refusals


@pytest.mark.parametrize(
    ("code", "who", "where"),
    [
        ("NoSuchKey", "admin", "mine/missing"),
        ("NoSuchBucket", "admin", "missing-bucket/key"),
        ("AccessDenied", "reader", "others/key"),
        ("SignatureDoesNotMatch", "forger", "mine/key"),
        ("InvalidAccessKeyId", "nobody", "mine/key"),
    ],
)
def test_a_refusal_is_said_in_the_words_that_boto3s_gets(
    s3: EmbeddedS3, admin: Any, new_bucket: Callable[[], str], code: str, who: str, where: str
) -> None:
    buckets = {"mine": new_bucket(), "others": new_bucket()}
    for name in buckets.values():
        admin.put_object(Bucket=name, Key="key", Body=b"content")
    rights = {"Effect": "Allow", "Action": "s3:*", "Resource": f"arn:aws:s3:::{buckets['mine']}/*"}
    reader = s3.create_user(
        f"reader-{uuid.uuid4().hex[:8]}", {"Version": "2012-10-17", "Statement": [rights]}
    )
    forger = Keypair(reader.access_key_id, "hunter2")
    keypair = {"admin": s3.admin, "reader": reader, "forger": forger, "nobody": NOBODY}[who]
    bucket, key = where.split("/")
    bucket = buckets.get(bucket, bucket)

    with pytest.raises(botocore_errors.ClientError) as expected:
        s3.client(keypair).get_object(Bucket=bucket, Key=key)
    with pytest.raises(S3Error) as caught:
        get(storage_of(s3, keypair), bucket, key)

    assert caught.value.code == error_code(expected.value) == code
    assert str(caught.value) == str(explain(expected.value))
    assert keypair.secret_access_key not in str(caught.value)


def test_a_refusal_is_understood_however_small_the_limit(storage: StorageSettings) -> None:
    with pytest.raises(S3Error) as caught:
        get(storage, "missing-bucket", "key", limit=1)

    assert caught.value.code == "NoSuchBucket"
