"""The embedded S3 server: what it must enforce, and what of S3 the product relies on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError, IncompleteReadError, ResponseStreamingError

from demo.s3 import EmbeddedS3, EmbeddedS3Error, Keypair
from demo.s3_faults import Fault

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "models/a b+c%&ü.bin"
BODY = bytes(range(256)) * 4


@pytest.fixture
def bucket(admin: Any, new_bucket: Callable[[], str]) -> str:
    """A bucket with one object, whose key is not easy to spell in a URL."""
    name = new_bucket()
    admin.put_object(Bucket=name, Key=KEY, Body=BODY)
    return name


@pytest.fixture
def reader(s3: EmbeddedS3, bucket: str) -> Keypair:
    """May read what lies under models/ of the bucket, and nothing else."""
    statement = {
        "Effect": "Allow",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/models/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    return s3.create_user(f"reader-{uuid.uuid4().hex[:8]}", policy)


def fetch(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


# Rights


def test_restricted_key_reads_its_prefix_and_nothing_else(
    s3: EmbeddedS3, admin: Any, bucket: str, reader: Keypair
) -> None:
    admin.put_object(Bucket=bucket, Key="other/secret", Body=b"x")
    client = s3.client(reader)

    assert client.get_object(Bucket=bucket, Key=KEY)["Body"].read() == BODY
    assert client.head_object(Bucket=bucket, Key=KEY)["ContentLength"] == len(BODY)
    for call in (
        lambda: client.get_object(Bucket=bucket, Key="other/secret"),
        lambda: client.put_object(Bucket=bucket, Key="models/new", Body=b""),
        lambda: client.delete_object(Bucket=bucket, Key=KEY),
        lambda: client.list_objects_v2(Bucket=bucket, Prefix="models/"),
        lambda: client.copy_object(
            Bucket=bucket, Key="models/copy", CopySource={"Bucket": bucket, "Key": KEY}
        ),
        lambda: client.create_multipart_upload(Bucket=bucket, Key="models/new"),
    ):
        assert refusal(call) == "AccessDenied"
    assert admin.head_object(Bucket=bucket, Key=KEY)["ContentLength"] == len(BODY)


def test_wrong_secret_and_unknown_key_are_refused(
    s3: EmbeddedS3, bucket: str, reader: Keypair
) -> None:
    forged = s3.client(Keypair(reader.access_key_id, "x" * 40))
    assert refusal(lambda: forged.get_object(Bucket=bucket, Key=KEY)) == "SignatureDoesNotMatch"
    unknown = s3.client(Keypair("AKIAUNKNOWN", "x" * 40))
    assert refusal(lambda: unknown.get_object(Bucket=bucket, Key=KEY)) == "InvalidAccessKeyId"


def test_unsigned_request_is_refused(s3: EmbeddedS3, bucket: str) -> None:
    for path in ("", f"/{bucket}", f"/{bucket}/models/x"):
        status, body = fetch(s3.endpoint_url + path)
        assert (status, b"<Code>AccessDenied</Code>" in body) == (403, True)


def test_keypair_keeps_its_secret_out_of_its_repr(reader: Keypair) -> None:
    assert reader.secret_access_key not in repr(reader)


# Presigned URLs


def presign(client: Any, bucket: str, key: str = KEY, **extra: Any) -> str:
    params = {"Bucket": bucket, "Key": key, **extra}
    url: str = client.generate_presigned_url("get_object", Params=params, ExpiresIn=60)
    return url


def test_presigned_url_works_under_enforcement(
    s3: EmbeddedS3, bucket: str, reader: Keypair
) -> None:
    url = presign(s3.client(reader), bucket)
    assert fetch(url) == (200, BODY)
    assert fetch(presign(s3.client(reader), bucket, ResponseContentType="image/png"))[0] == 200

    ranged = urllib.request.Request(url, headers={"Range": "bytes=4-7"})
    with urllib.request.urlopen(ranged) as response:
        assert (response.status, response.read()) == (206, BODY[4:8])


def test_presigned_url_of_a_key_without_the_right_is_refused(
    s3: EmbeddedS3, admin: Any, bucket: str, reader: Keypair
) -> None:
    admin.put_object(Bucket=bucket, Key="other/secret", Body=b"x")
    assert fetch(presign(s3.client(reader), bucket, "other/secret"))[0] == 403


def test_altered_presigned_url_is_refused(s3: EmbeddedS3, bucket: str, reader: Keypair) -> None:
    url = presign(s3.client(reader), bucket)
    signature = url[-64:]
    for altered in (
        url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000"),
        url.replace("models/", "models/x"),
        url.replace(signature, signature[::-1]),
        f"{url}&response-content-type=text/html",
    ):
        status, body = fetch(altered)
        assert (status, b"<Code>SignatureDoesNotMatch</Code>" in body) == (403, True)


def test_presigned_url_expires(s3: EmbeddedS3, bucket: str, reader: Keypair) -> None:
    url = presign(s3.client(reader), bucket)
    s3.set_clock(59)
    try:
        assert fetch(url)[0] == 200
        s3.set_clock(62)
        status, body = fetch(url)
    finally:
        s3.set_clock(0)
    assert (status, b"Request has expired" in body) == (403, True)


def test_presigned_url_without_version_4_or_too_long_lived_is_malformed(
    s3: EmbeddedS3, bucket: str, reader: Keypair
) -> None:
    client = s3.client(reader)
    eight_days = client.generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": KEY}, ExpiresIn=8 * 24 * 3600
    )
    version_2 = f"{s3.endpoint_url}/{bucket}/x?AWSAccessKeyId=A&Signature=B&Expires=99999999999"
    for url in (eight_days, version_2):
        assert fetch(url)[0] == 400


# What of S3 the product relies on


def test_ranges_are_partial_content_with_the_objects_etag(admin: Any, bucket: str) -> None:
    whole = admin.get_object(Bucket=bucket, Key=KEY)
    part = admin.get_object(Bucket=bucket, Key=KEY, Range="bytes=1000-2000")
    assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert part["ContentRange"] == f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"
    assert (part["Body"].read(), part["ETag"]) == (BODY[1000:], whole["ETag"])
    beyond = refusal(lambda: admin.get_object(Bucket=bucket, Key=KEY, Range="bytes=5000-"))
    assert beyond == "InvalidRange"


def test_conditions_are_honoured(admin: Any, bucket: str) -> None:
    etag = admin.head_object(Bucket=bucket, Key=KEY)["ETag"]
    assert admin.get_object(Bucket=bucket, Key=KEY, IfMatch=etag)["ETag"] == etag
    admin.put_object(Bucket=bucket, Key=KEY, Body=b"overwritten")
    for call in (
        lambda: admin.get_object(Bucket=bucket, Key=KEY, IfMatch=etag),
        lambda: admin.put_object(Bucket=bucket, Key=KEY, Body=b"", IfNoneMatch="*"),
        lambda: admin.put_object(Bucket=bucket, Key=KEY, Body=b"", IfMatch=etag),
    ):
        assert refusal(call) == "PreconditionFailed"


def test_multipart_upload_joins_parts_and_copied_ranges(admin: Any, bucket: str) -> None:
    part_size = 5 * 1024**2
    source = os.urandom(part_size + 100)
    admin.put_object(Bucket=bucket, Key="source", Body=source)
    upload = {"Bucket": bucket, "Key": "joined"}
    upload["UploadId"] = admin.create_multipart_upload(**upload)["UploadId"]
    first = admin.upload_part_copy(
        **upload,
        PartNumber=1,
        CopySource={"Bucket": bucket, "Key": "source"},
        CopySourceRange=f"bytes=100-{part_size + 99}",
    )["CopyPartResult"]
    second = admin.upload_part(**upload, PartNumber=2, Body=b"tail")
    parts = [
        {"PartNumber": number, "ETag": part["ETag"]}
        for number, part in enumerate((first, second), start=1)
    ]
    wrong = [parts[0], {"PartNumber": 2, "ETag": parts[0]["ETag"]}]
    complete = admin.complete_multipart_upload
    assert refusal(lambda: complete(**upload, MultipartUpload={"Parts": wrong})) == "InvalidPart"
    complete(**upload, MultipartUpload={"Parts": parts})

    joined = admin.get_object(Bucket=bucket, Key="joined")
    assert joined["Body"].read() == source[100:] + b"tail"
    assert joined["ETag"].endswith('-2"')


def test_copy_within_the_server(admin: Any, bucket: str) -> None:
    admin.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": KEY})
    assert admin.get_object(Bucket=bucket, Key="copy")["Body"].read() == BODY


def test_listing_comes_in_pages(admin: Any, bucket: str) -> None:
    for number in range(5):
        admin.put_object(Bucket=bucket, Key=f"many/{number}", Body=b"")
    pages = list(
        admin.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix="many/", PaginationConfig={"PageSize": 2}
        )
    )
    assert [len(page["Contents"]) for page in pages] == [2, 2, 1]
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == [
        f"many/{number}" for number in range(5)
    ]


def test_region_auto_is_accepted(s3: EmbeddedS3, bucket: str) -> None:
    from s3 import connect
    from settings import load_storage_settings

    client = connect(load_storage_settings(s3.environment()))
    assert client.get_object(Bucket=bucket, Key=KEY)["Body"].read() == BODY


# Requests recorded, faults committed


def test_requests_are_recorded_with_who_asked_for_what(
    s3: EmbeddedS3, bucket: str, reader: Keypair
) -> None:
    client = s3.client(reader)
    before = len(s3.requests(bucket))
    client.get_object(Bucket=bucket, Key=KEY, Range="bytes=0-9")["Body"].read()
    refusal(lambda: client.list_objects_v2(Bucket=bucket))
    fetch(presign(client, bucket))

    read, listed, shared = s3.requests(bucket)[before:]
    assert (read.method, read.key, read.status, read.range) == ("GET", KEY, 206, "bytes=0-9")
    assert (read.access_key_id, read.response_bytes) == (reader.access_key_id, 10)
    assert (listed.key, listed.status, "list-type" in listed.query) == ("", 403, True)
    assert (shared.presigned, shared.access_key_id) == (True, reader.access_key_id)


def test_fault_answers_with_a_status_so_many_times(s3: EmbeddedS3, admin: Any, bucket: str) -> None:
    other = KEY + ".other"
    admin.put_object(Bucket=bucket, Key=other, Body=b"fine")
    with s3.fault(Fault("status", bucket=bucket, key="models/*ü.bin", skip=1, times=2)):
        read = lambda key=KEY: admin.get_object(Bucket=bucket, Key=key)  # noqa: E731
        assert read()["ETag"]
        assert read(other)["ETag"]
        assert [refusal(read), refusal(read)] == ["SlowDown", "SlowDown"]
        assert read()["ETag"]


def test_fault_corrupts_one_byte_wherever_it_is_read(
    s3: EmbeddedS3, admin: Any, bucket: str
) -> None:
    def read(span: str) -> bytes:
        body: bytes = admin.get_object(Bucket=bucket, Key=KEY, Range=span)["Body"].read()
        return body

    wrong = bytearray(BODY)
    wrong[500] ^= 0xFF
    with s3.fault(Fault("corrupt", bucket=bucket, key=KEY, at=500)):
        assert read("bytes=0-") == wrong
        assert read("bytes=400-599") == wrong[400:600]
        assert read("bytes=0-499") == BODY[:500]
    assert read("bytes=0-") == BODY


def test_fault_cuts_an_answer_short(s3: EmbeddedS3, admin: Any, bucket: str) -> None:
    with s3.fault(Fault("truncate", bucket=bucket, key=KEY, at=100)):
        answer = admin.get_object(Bucket=bucket, Key=KEY)
        assert answer["ContentLength"] == len(BODY)
        with pytest.raises((IncompleteReadError, ResponseStreamingError)):
            answer["Body"].read()


def test_fault_holds_an_answer_until_faults_are_cleared(
    s3: EmbeddedS3, admin: Any, bucket: str
) -> None:
    answers: list[Any] = []
    reading = threading.Thread(
        target=lambda: answers.append(admin.get_object(Bucket=bucket, Key=KEY))
    )
    s3.inject(Fault("hold", bucket=bucket, key=KEY))
    reading.start()
    s3.wait_for_held_request()
    assert not answers
    s3.clear_faults()
    reading.join(10)
    assert answers[0]["ContentLength"] == len(BODY)


def test_controls_need_the_servers_token(s3: EmbeddedS3) -> None:
    assert fetch(f"{s3.endpoint_url}/_embedded_s3/requests")[0] == 403


# Its life


def test_server_ends_with_a_parent_that_is_killed() -> None:
    program = (
        "import sys; from demo.s3 import EmbeddedS3\n"
        "server = EmbeddedS3().start(); print(server.endpoint_url, flush=True)\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        address = urlsplit(parent.stdout.readline().strip())
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            parent.send_signal(signal.SIGKILL)
            # The server's end of this connection closes when its process does.
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_stop_can_be_called_twice_and_frees_the_port() -> None:
    server = EmbeddedS3()
    with server:
        address = urlsplit(server.endpoint_url)
        assert server.start() is server
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.hostname, address.port), timeout=5)
    with pytest.raises(EmbeddedS3Error, match="not running"):
        _ = server.endpoint_url


def test_failed_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "werkzeug.py").write_text("raise ImportError('werkzeug is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EmbeddedS3Error, match="werkzeug is broken here"):
        EmbeddedS3().start()
