"""Storing images: a URL only for what is there, no image over another, and a clear word when it cannot be done."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

import s3 as s3_client
from demo.s3 import EmbeddedS3, Keypair
from demo.s3_faults import Fault
from images.encode import EncodedImage, encode, read_metadata
from images.errors import ImagesError
from images.store import ImageStore, safe_id
from settings import StorageSettings
from tests.images.plain_s3 import PlainS3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SECRET = "the-secret-access-key-nobody-may-see"


def red() -> EncodedImage:
    return encode(Image.new("RGB", (8, 8), "red"), "png", 80, {"prompt": "red"})


def connect(endpoint_url: str, keys: Keypair | None = None) -> S3Client:
    keys = keys or Keypair("AKIDEXAMPLE", SECRET)
    return s3_client.connect(
        StorageSettings(
            access_key_id=keys.access_key_id,
            secret_access_key=keys.secret_access_key,  # type: ignore[arg-type]
            endpoint_url=endpoint_url,
        )
    )


@pytest.fixture(scope="module")
def client(s3: EmbeddedS3) -> S3Client:
    return connect(s3.endpoint_url, s3.admin)


@pytest.fixture
def bucket(admin: S3Client) -> str:
    name = f"pictures-{uuid.uuid4().hex[:12]}"
    admin.create_bucket(Bucket=name)
    return name


@pytest.fixture
def store(client: S3Client, bucket: str) -> ImageStore:
    return ImageStore(client, bucket)


@pytest.fixture
def plain() -> Iterator[PlainS3]:
    with PlainS3() as server:
        yield server


def fetch(url: str) -> tuple[bytes, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read(), answer.headers


def keys_in(client: S3Client, bucket: str) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_the_returned_url_gives_the_image_to_anyone_who_holds_it(store: ImageStore) -> None:
    stored = store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    data, headers = fetch(stored.url)

    assert data == red().data
    assert read_metadata(data) == {"prompt": "red"}
    assert headers["Content-Type"] == "image/png"
    assert headers["Cache-Control"] == "private, max-age=31536000, immutable"


def test_without_its_signature_the_url_gives_nothing(store: ImageStore) -> None:
    stored = store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(stored.url.split("?")[0])


def test_the_url_works_as_long_as_was_asked_and_no_longer(
    s3: EmbeddedS3, client: S3Client, bucket: str
) -> None:
    store = ImageStore(client, bucket, url_lifetime=100)
    stored = store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    try:
        s3.set_clock(90)
        assert fetch(stored.url)[0] == red().data
        s3.set_clock(110)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(stored.url)
    finally:
        s3.set_clock(0)


@pytest.mark.parametrize("prefix", ["", "my images/50% é"])
def test_an_earlier_output_s_urls_work_again_once_they_are_signed_anew(
    s3: EmbeddedS3, client: S3Client, bucket: str, prefix: str
) -> None:
    store = ImageStore(client, bucket, prefix, url_lifetime=100)
    output = [store.upload(red(), prediction_id="a-cat", index=n, now=NOON).url for n in range(2)]
    long_lived = ImageStore(client, bucket, prefix, url_lifetime=10_000)

    again = long_lived.signed_anew({"images": output, "seed": 7})

    assert isinstance(again, dict)
    assert isinstance(again["images"], list)
    try:
        s3.set_clock(110)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(output[0])
        assert [fetch(str(url))[0] for url in again["images"]] == [red().data] * 2
    finally:
        s3.set_clock(0)
    assert again["seed"] == 7


def test_a_url_that_names_the_bucket_in_its_host_is_signed_anew() -> None:
    virtual = s3_client.connect(
        StorageSettings(access_key_id="AKIDEXAMPLE", secret_access_key=SECRET, region="eu-west-1")  # type: ignore[arg-type]
    )
    store = ImageStore(virtual, "pictures")
    url = store._url("an image", "pictures/2026/a b.png")
    ended = url.replace("X-Amz-Signature=", "X-Amz-Signature=0")

    again = store.signed_anew(ended)

    assert url.startswith("https://pictures.s3")
    assert str(again).partition("?")[0] == url.partition("?")[0]
    assert again != ended


def test_only_presigned_urls_of_the_store_s_own_images_are_signed_anew(
    client: S3Client, bucket: str, s3: EmbeddedS3
) -> None:
    store = ImageStore(client, bucket, "team")
    outputs = [
        "a text",
        f"{s3.endpoint_url}/{bucket}/team/2026/11/20/a-cat-0.png",
        f"{s3.endpoint_url}/elsewhere/team/a.png?X-Amz-Signature=00",
        f"{s3.endpoint_url}/{bucket}/private/a.png?X-Amz-Signature=00",
        f"https://example.com/{bucket}/team/a.png?X-Amz-Signature=00",
        "http://[?X-Amz-Signature=00",
        None,
        7.5,
    ]

    assert store.signed_anew([*outputs]) == outputs


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("", "2026/11/20/a-cat-0.png"),
        ("sdxl", "sdxl/2026/11/20/a-cat-0.png"),
        ("//sdxl//eu/", "sdxl/eu/2026/11/20/a-cat-0.png"),
    ],
)
def test_the_key_says_when_and_for_whom(
    client: S3Client, bucket: str, prefix: str, key: str
) -> None:
    stored = ImageStore(client, bucket, prefix).upload(
        red(), prediction_id="a-cat", index=0, now=NOON
    )

    assert (stored.bucket, stored.key) == (bucket, key)
    assert keys_in(client, bucket) == [key]


def test_the_date_in_the_key_is_utc(store: ImageStore) -> None:
    late = datetime(2026, 12, 31, 22, 0, tzinfo=timezone(timedelta(hours=-8)))

    assert store.upload(red(), prediction_id="x", index=3, now=late).key == "2027/01/01/x-3.png"


def test_a_repeated_id_leaves_the_earlier_image_alone(client: S3Client, store: ImageStore) -> None:
    blue = encode(Image.new("RGB", (8, 8), "blue"), "png", 80, {})

    first = store.upload(red(), prediction_id="same", index=0, now=NOON)
    second = store.upload(blue, prediction_id="same", index=0, now=NOON)
    third = store.upload(blue, prediction_id="same", index=0, now=NOON)

    assert len({first.key, second.key, third.key}) == 3
    assert re.fullmatch(r"2026/11/20/same-0-[0-9a-f]{8}\.png", second.key)
    assert [fetch(image.url)[0] for image in (first, second)] == [red().data, blue.data]


def test_the_same_id_at_the_same_moment_stores_every_image(
    client: S3Client, store: ImageStore, bucket: str
) -> None:
    together = threading.Barrier(8)

    def upload(_: int) -> str:
        together.wait()
        return store.upload(red(), prediction_id="same", index=0, now=NOON).key

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(upload, range(8)))

    assert len(keys) == 8
    assert set(keys_in(client, bucket)) == keys


@pytest.mark.parametrize(
    ("prediction_id", "segment"),
    [
        ("550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440000"),
        ("pred_18e9ba.7", "pred_18e9ba.7"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/../../b", "a-.-.-b"),
        ("....", None),
        ("a....b", "a.b"),
        ("/absolute", "absolute"),
        ("a b?c#d%2Fe&f=g", "a-b-c-d-2Fe-f-g"),
        ("line\r\nbreak\0nul", "line-break-nul"),
        ("日本語", None),
        ("x" * 500, "x" * 64),
        ("x" * 63 + "/../y", "x" * 63),
        ("", None),
        (None, None),
    ],
)
def test_a_caller_s_id_becomes_one_harmless_path_segment(
    client: S3Client, store: ImageStore, prediction_id: str | None, segment: str | None
) -> None:
    expected = re.escape(segment) if segment else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

    stored = store.upload(red(), prediction_id=prediction_id, index=1, now=NOON)

    assert re.fullmatch(rf"2026/11/20/{expected}-1\.png", stored.key)
    assert fetch(stored.url)[0] == red().data


def test_ids_that_become_the_same_segment_keep_their_images_apart(store: ImageStore) -> None:
    keys = {
        store.upload(red(), prediction_id=prediction_id, index=0, now=NOON).key
        for prediction_id in ("a b", "a/b", "a?b")
    }

    assert safe_id("a b") == safe_id("a/b") == safe_id("a?b")
    assert len(keys) == 3


def test_a_public_bucket_s_url_is_its_address_and_the_escaped_key(
    client: S3Client, bucket: str
) -> None:
    store = ImageStore(
        client, bucket, "my images/50% é", public_base_url="https://images.example.com/cdn/"
    )

    stored = store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    assert stored.key == "my images/50% é/2026/11/20/a-cat-0.png"
    assert stored.url == (
        "https://images.example.com/cdn/my%20images/50%25%20%C3%A9/2026/11/20/a-cat-0.png"
    )
    head = client.head_object(Bucket=bucket, Key=stored.key)
    assert head["CacheControl"] == "public, max-age=31536000, immutable"


def test_a_busy_server_is_asked_again(s3: EmbeddedS3, store: ImageStore, bucket: str) -> None:
    with s3.fault(Fault("status", method="PUT", bucket=bucket, status=503, times=1)):
        stored = store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    assert fetch(stored.url)[0] == red().data


def test_a_server_that_stays_busy_is_named_with_the_number_of_attempts(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        s3_client.client, "ATTEMPTS", 2
    )  # the waits between five attempts are seconds
    store = ImageStore(connect(s3.endpoint_url, s3.admin), bucket)

    with (
        s3.fault(Fault("status", method="PUT", bucket=bucket, status=503)),
        pytest.raises(ImagesError) as caught,
    ):
        store.upload(red(), prediction_id="a-cat", index=2, now=NOON)

    message = str(caught.value)
    assert message.startswith(
        "image 2 of prediction a-cat was generated but could not be stored as "
        f"s3://{bucket}/2026/11/20/a-cat-2.png (tried 2 times): "
    )


def test_an_unreachable_server_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client.client, "ATTEMPTS", 2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        store = ImageStore(connect(f"http://127.0.0.1:{closed.getsockname()[1]}"), "pictures")

        with pytest.raises(
            ImagesError, match=r"s3://pictures/\S+ \(tried 2 times\): .*AWS_ENDPOINT"
        ):
            store.upload(red(), prediction_id="a-cat", index=0, now=NOON)


def test_a_bucket_that_refuses_is_a_clear_error(s3: EmbeddedS3, bucket: str) -> None:
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::elsewhere/*"}
        ],
    }
    keys = s3.create_user(f"{bucket}-user", policy)
    store = ImageStore(connect(s3.endpoint_url, keys), bucket)

    with pytest.raises(ImagesError) as caught:
        store.upload(red(), prediction_id="a-cat", index=0, now=NOON)

    message = str(caught.value)
    assert f"s3://{bucket}/2026/11/20/a-cat-0.png" in message
    assert "may not do that" in message
    assert "policy" in message
    assert "tried" not in message
    assert keys.secret_access_key not in message


def test_a_bucket_that_does_not_exist_is_a_clear_error(client: S3Client) -> None:
    with pytest.raises(ImagesError, match=r"s3://no-such-bucket/.*the bucket does not exist"):
        ImageStore(client, "no-such-bucket").upload(red(), prediction_id="a-cat", index=0, now=NOON)


def test_a_wrong_secret_is_a_clear_error(s3: EmbeddedS3, bucket: str) -> None:
    keys = Keypair(s3.admin.access_key_id, SECRET)

    with pytest.raises(ImagesError, match="does not belong to the access key ID") as caught:
        ImageStore(connect(s3.endpoint_url, keys), bucket).upload(
            red(), prediction_id="a-cat", index=0, now=NOON
        )

    assert SECRET not in str(caught.value)


def test_bytes_damaged_on_the_way_are_refused_and_sent_again(plain: PlainS3) -> None:
    plain.damage = 1

    stored = ImageStore(connect(plain.endpoint_url), "pictures").upload(
        red(), prediction_id="a-cat", index=0, now=NOON
    )

    assert plain.objects == {f"pictures/{stored.key}": red().data}
    assert [key for key, _ in plain.asked] == ["pictures/2026/11/20/a-cat-0.png"] * 2


def test_bytes_damaged_every_time_are_an_error_and_no_url(plain: PlainS3) -> None:
    plain.damage = 1000

    with pytest.raises(ImagesError, match="could not be stored"):
        ImageStore(connect(plain.endpoint_url), "pictures").upload(
            red(), prediction_id="a-cat", index=0, now=NOON
        )

    assert plain.objects == {}


def test_without_conditional_writes_no_name_is_used_twice(
    plain: PlainS3, caplog: pytest.LogCaptureFixture
) -> None:
    plain.conditional_writes = False
    store = ImageStore(connect(plain.endpoint_url), "pictures")

    keys = [store.upload(red(), prediction_id="same", index=0, now=NOON).key for _ in range(3)]

    assert sorted(plain.objects) == sorted(f"pictures/{key}" for key in keys)
    assert all(re.fullmatch(r"2026/11/20/same-0-[0-9a-f]{8}\.png", key) for key in keys)
    assert [conditional for _, conditional in plain.asked] == [True, False, False, False]
    assert [record.message.count("no conditional writes") for record in caplog.records] == [1]


def test_a_lost_answer_still_ends_in_a_url_of_a_whole_image(plain: PlainS3) -> None:
    plain.lose = 1

    stored = ImageStore(connect(plain.endpoint_url), "pictures").upload(
        red(), prediction_id="a-cat", index=0, now=NOON
    )

    assert plain.objects[f"pictures/{stored.key}"] == red().data
    assert set(plain.objects.values()) == {red().data}
