"""A signature is byte for byte the one botocore makes, and a server that checks signatures and rights accepts it."""

from __future__ import annotations

import http.client
import json
import stat
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as botocore_errors
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from demo.s3 import EmbeddedS3, Keypair
from s3 import explain
from s3.endpoint import Endpoint, endpoint_of
from s3.signing import Credentials, CredentialsError, Signer, credentials_of, region_of
from settings import SettingsError, StorageSettings, load_storage_settings

KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)
NAMES = st.sampled_from(
    ["Range", "If-Match", "If-None-Match", "x-amz-request-payer", "User-Agent", "Connection", "TE"]
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
ENDPOINTS = st.builds(
    Endpoint,
    st.sampled_from(["http", "https"]),
    st.sampled_from(["t3.storage.dev", "127.0.0.1", "::1"]),
    st.sampled_from([80, 443, 9000]),
    st.sampled_from(["", "/base"]),
    st.sampled_from(["path", "virtual"]),
)
CREDENTIALS = st.builds(Credentials, VISIBLE, VISIBLE, st.none() | VISIBLE)
QUERIES = st.sampled_from(
    ["", "versionId=1%2F2", "b=2&a=1&a=0", "acl", "list-type=2&prefix=a%20b&delimiter="]
)


def signed_by_botocore(
    credentials: Credentials, region: str, method: str, url: str, headers: dict[str, str]
) -> dict[str, str]:
    request = AWSRequest(method, url, headers=headers)
    keypair = BotocoreCredentials(
        credentials.access_key_id, credentials.secret_access_key, credentials.session_token
    )
    S3SigV4Auth(keypair, "s3", region).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


@hypothesis_settings(deadline=None, derandomize=True, database=None)
@given(
    credentials=CREDENTIALS,
    region=st.sampled_from(["auto", "us-east-1", "cn-north-1"]),
    method=st.sampled_from(["GET", "HEAD"]),
    endpoint=ENDPOINTS,
    bucket=st.sampled_from(["bucket", "my.bucket", "My_Bucket"]),
    key=KEYS,
    query=QUERIES,
    headers=st.dictionaries(NAMES, VALUES, max_size=4),
)
@example(
    credentials=Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzE//+="),
    region="us-east-1",
    method="GET",
    endpoint=Endpoint("https", "s3.amazonaws.com", 443, "", "virtual"),
    bucket="bucket",
    key="a b+c%d/ü/😀//x~y/../z",
    query="",
    headers={"Range": "bytes=0-16777215", "If-Match": '"0f  3c"'},
)  # fmt: skip
def test_every_signature_is_botocores(
    credentials: Credentials,
    region: str,
    method: str,
    endpoint: Endpoint,
    bucket: str,
    key: str,
    query: str,
    headers: dict[str, str],
) -> None:
    place = endpoint.place(bucket, key)
    url = f"{endpoint.scheme}://{place.host_header}{place.path}" + (f"?{query}" if query else "")
    expected = signed_by_botocore(credentials, region, method, url, headers)
    now = datetime.strptime(expected["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)

    ours = Signer(lambda: credentials, region).headers(
        method, place.host_header, place.path, query, headers, now
    )

    assert ours.pop("Host") == place.host_header
    assert {name.lower(): value for name, value in ours.items()} == expected


def test_the_example_of_the_aws_documentation() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, "Example: GET Object"."""
    credentials = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")

    headers = Signer(lambda: credentials, "us-east-1").headers(
        "GET",
        "examplebucket.s3.amazonaws.com",
        "/test.txt",
        "",
        {"Range": "bytes=0-9"},
        datetime(2013, 5, 24, tzinfo=UTC),
    )

    assert headers["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


def signature(signer: Signer, now: datetime | None = None, **headers: str) -> str:
    return signer.headers("GET", "host", "/bucket/key", "", headers, now)["Authorization"]


def test_what_a_front_may_rewrite_is_sent_but_not_signed() -> None:
    signer = Signer(lambda: Credentials("key", "secret"), "auto")
    now = datetime.now(UTC)

    headers = signer.headers("GET", "host", "/b/k", "", {"Accept-Encoding": "identity"}, now)

    assert headers["Accept-Encoding"] == "identity"
    assert (
        headers["Authorization"]
        == signer.headers("GET", "host", "/b/k", "", {}, now)["Authorization"]
    )


def test_a_new_day_and_new_credentials_get_a_key_of_their_own() -> None:
    held = [Credentials("first", "secret one")]
    signer = Signer(lambda: held[0], "auto")
    evening = datetime(2026, 1, 1, 23, 59, 59, tzinfo=UTC)
    first = signature(signer, evening)

    second = signature(signer, evening + timedelta(seconds=1))
    held[0] = Credentials("second", "secret two", "token")
    third = signature(signer, evening)

    assert second == signature(
        Signer(lambda: Credentials("first", "secret one"), "auto"), evening + timedelta(seconds=1)
    )
    assert third == signature(Signer(lambda: held[0], "auto"), evening)
    assert len({first, second, third}) == 3


def test_any_time_zone_is_signed_in_utc() -> None:
    signer = Signer(lambda: Credentials("key", "secret"), "auto")
    here = datetime(2026, 1, 1, 1, 0, tzinfo=timezone(timedelta(hours=2)))

    headers = signer.headers("GET", "host", "/b/k", "", {}, here)

    assert headers["x-amz-date"] == "20251231T230000Z"


def test_the_servers_clock_is_followed() -> None:
    signer = Signer(lambda: Credentials("key", "secret"), "auto")
    assert signer.clock_offset == 0.0
    ahead = datetime.now(UTC) + timedelta(days=3)

    signer.adjust_clock(format_datetime(ahead, usegmt=True))

    assert signer.clock_offset == pytest.approx(3 * 24 * 3600, abs=60)
    date = signer.headers("GET", "host", "/b/k", "", {})["x-amz-date"]
    signed = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs(signed - ahead) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "date", ["", "yesterday", "Tue, 99 Foo 2026 00:00:00 GMT", f"Tue, 01 Jan {10**20} 00:00:00 GMT"]
)
def test_a_date_that_is_none_leaves_the_clock_alone(date: str) -> None:
    signer = Signer(lambda: Credentials("key", "secret"), "auto")

    signer.adjust_clock(date)

    assert signer.clock_offset == 0.0


def test_no_secret_shows_where_things_are_printed() -> None:
    credentials = Credentials("key", "hunter2", "swordfish")
    signer = Signer(lambda: credentials, "auto")
    signature(signer)

    shown = f"{credentials} {signer!r} {vars(signer)}"

    assert "hunter2" not in shown
    assert "swordfish" not in shown


def test_a_keypair_of_the_settings_is_used_and_nothing_else_is_asked(
    bare_environment: pytest.MonkeyPatch,
) -> None:
    bare_environment.setenv("AWS_PROFILE", "nowhere")
    settings = StorageSettings(
        access_key_id="key", secret_access_key="secret", session_token="token"
    )

    assert credentials_of(settings)() == Credentials("key", "secret", "token")


def test_without_a_keypair_botocores_chain_is_asked(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        "[models]\naws_access_key_id = key\naws_secret_access_key = secret\naws_session_token = token\n"
    )
    bare_environment.setenv("AWS_PROFILE", "models")

    assert credentials_of(StorageSettings())() == Credentials("key", "secret", "token")


def test_no_credentials_are_said_in_the_words_of_s3(bare_environment: pytest.MonkeyPatch) -> None:
    credentials = credentials_of(StorageSettings())

    for _ in range(2):
        with pytest.raises(CredentialsError) as caught:
            credentials()
        assert str(explain(botocore_errors.NoCredentialsError())) in str(caught.value)


def test_half_a_keypair_is_said_in_the_words_of_s3(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("AWS_ACCESS_KEY_ID", "key")

    with pytest.raises(CredentialsError, match="no credentials were found"):
        credentials_of(StorageSettings())()


def test_a_missing_profile_is_said_as_everywhere(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("AWS_PROFILE", "nowhere")

    with pytest.raises(SettingsError, match=r"AWS_PROFILE is wrong: .*nowhere"):
        credentials_of(StorageSettings())()


def test_credentials_that_cannot_be_loaded_are_said_without_their_text(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = executable(tmp_path / "program", "echo hunter2 >&2; exit 1")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")

    with pytest.raises(CredentialsError, match="CredentialRetrievalError") as caught:
        credentials_of(StorageSettings())()

    assert "hunter2" not in str(caught.value)


def test_credentials_are_looked_for_once_and_renewed_before_they_expire(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process whose credentials are already due is asked at each use; many threads make no second first look."""
    asked = tmp_path / "asked"
    due = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    answer = json.dumps(
        {"Version": 1, "AccessKeyId": "key-N", "SecretAccessKey": "secret", "SessionToken": "token", "Expiration": due}
    ).replace("key-N", "key-'$(wc -l < asked)'")  # fmt: skip
    program = executable(tmp_path / "program", f"cd '{tmp_path}'; echo >> asked; echo '{answer}'")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    credentials = credentials_of(StorageSettings())

    first = credentials()
    second = credentials()

    assert asked.read_text().count("\n") == 3  # found, then due at both uses
    assert (first.access_key_id, second.access_key_id) == ("key-2", "key-3")


def test_threads_share_one_search_for_credentials(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = executable(
        tmp_path / "program",
        f"echo >> '{tmp_path}/asked'; "
        """echo '{"Version": 1, "AccessKeyId": "key", "SecretAccessKey": "secret"}'""",
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    credentials = credentials_of(StorageSettings())
    together = threading.Barrier(8)

    def ask() -> Credentials:
        together.wait()
        return credentials()

    with ThreadPoolExecutor(8) as pool:
        found = [task.result() for task in [pool.submit(ask) for _ in range(8)]]

    assert set(found) == {Credentials("key", "secret")}
    assert (tmp_path / "asked").read_text() == "\n"


def executable(file: Path, commands: str) -> Path:
    file.write_text(f"#!/bin/sh\n{commands}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


Get = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def get(s3: EmbeddedS3) -> Get:
    """A signed GET to the embedded server, by the standard library's own HTTP client."""

    def ask(
        bucket: str, key: str, keypair: Keypair | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        settings = load_storage_settings(s3.environment(keypair))
        place = endpoint_of(settings).place(bucket, key)
        signer = Signer(credentials_of(settings), region_of(settings))
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        signed = signer.headers("GET", place.host_header, place.path, "", given)
        connection = http.client.HTTPConnection(place.connect_host, place.port)
        try:
            connection.putrequest("GET", place.path, skip_host=True, skip_accept_encoding=True)
            for name, value in signed.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    return ask


@pytest.mark.parametrize(
    "key",
    ["plain.txt", "a b+c%d/ü/漢字/😀.txt", "a//b", "~-_.", "!$&'()*,;=:@[]", "100%25", "q?a=b#c"],
)
def test_a_server_that_checks_signatures_hands_the_object_out(
    admin: Any, new_bucket: Callable[[], str], get: Get, key: str
) -> None:
    bucket = new_bucket()
    admin.put_object(Bucket=bucket, Key=key, Body=b"content")

    status, _, body = get(bucket, key)

    assert (status, body) == (200, b"content")


def test_ranges_and_conditions_are_signed_along(
    admin: Any, new_bucket: Callable[[], str], get: Get
) -> None:
    bucket = new_bucket()
    etag = admin.put_object(Bucket=bucket, Key="key", Body=b"0123456789")["ETag"]

    status, headers, body = get(bucket, "key", Range="bytes=2-4", If_Match=etag)
    unchanged, _, _ = get(bucket, "key", If_None_Match=etag)
    replaced, _, _ = get(bucket, "key", If_Match='"another"')

    assert (status, body, headers["ETag"]) == (206, b"234", etag)
    assert unchanged == 304
    assert replaced == 412


def test_a_wrong_secret_and_a_missing_right_are_refused(
    s3: EmbeddedS3, admin: Any, new_bucket: Callable[[], str], get: Get
) -> None:
    mine, other = new_bucket(), new_bucket()
    for bucket in (mine, other):
        admin.put_object(Bucket=bucket, Key="key", Body=b"content")
    rights = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{mine}/*"}
    reader = s3.create_user(
        f"reader-{uuid.uuid4().hex[:8]}", {"Version": "2012-10-17", "Statement": [rights]}
    )

    allowed = get(mine, "key", reader)
    hidden = get(other, "key", reader)
    forged = get(mine, "key", Keypair(reader.access_key_id, "not-its-secret"))

    assert allowed[0] == 200
    assert (hidden[0], b"AccessDenied" in hidden[2]) == (403, True)
    assert (forged[0], b"SignatureDoesNotMatch" in forged[2]) == (403, True)
