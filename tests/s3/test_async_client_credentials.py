"""The machine's own credentials sign as well: used on the loop while they are at hand, looked for beside it."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore import exceptions as botocore_errors

from demo.s3 import EmbeddedS3, Keypair
from s3 import explain
from s3.async_client import SIGNING_THREADS, AsyncClient, S3Error
from settings import SettingsError, StorageSettings, load_storage_settings
from tests.s3.test_async_client import (
    bucket,
    get,
    put,
    storage,
    with_client,
)
from tests.s3.test_async_client_faults import Answering, found, in_turn
from tests.s3.test_signing import executable

__all__ = ["bucket", "storage"]  # fixtures: pytest finds them by their names


def told(keys: Keypair, valid_for: timedelta | None = None) -> str:
    """What a credential process prints."""
    answer = {
        "Version": 1,
        "AccessKeyId": keys.access_key_id,
        "SecretAccessKey": keys.secret_access_key,
    }
    if valid_for is not None:
        answer["Expiration"] = (datetime.now(UTC) + valid_for).isoformat()
    return json.dumps(answer)


class Process:
    """A credential process that prints `answer`, and that from its run `held_from` on (1: the first) waits for another.

    `runs` is how often it was started.
    """

    def __init__(self, folder: Path, answer: str, held_from: int) -> None:
        self._folder = folder
        for pipe in ("started", "answer"):
            os.mkfifo(folder / pipe)
        (folder / "first").write_text(answer)
        (folder / "runs").touch()
        held = "echo > started; timeout 20 cat answer"
        program = executable(
            folder / "program",
            f"cd '{folder}'; echo >> runs\n"
            f"if [ $(wc -l < runs) -ge {held_from} ]; then {held}; else cat first; fi",
        )
        (folder / "config").write_text(f"[default]\ncredential_process = {program}\n")

    @property
    def runs(self) -> int:
        return (self._folder / "runs").read_text().count("\n")

    async def is_held(self) -> None:
        await asyncio.to_thread((self._folder / "started").read_text)

    async def go_on(self, answer: str) -> None:
        await asyncio.to_thread((self._folder / "answer").write_text, answer)


NEVER = 1000


@pytest.fixture
def keyless(s3: EmbeddedS3) -> StorageSettings:
    """Where the server is, and nobody's keys."""
    variables = s3.environment()
    return load_storage_settings(
        {name: variables[name] for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION")}
    )


def test_the_machines_own_credentials_sign_as_well(
    s3: EmbeddedS3, keyless: StorageSettings, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {s3.admin.access_key_id}\n"
        f"aws_secret_access_key = {s3.admin.secret_access_key}\n"
    )

    put(keyless, bucket, "a b+c", b"content")

    assert get(keyless, bucket, "a b+c").body == b"content"


def test_fetching_them_holds_up_nobody_else_on_the_loop(
    s3: EmbeddedS3, keyless: StorageSettings, bucket: str, tmp_path: Path
) -> None:
    process = Process(tmp_path, "", held_from=1)

    async def write(client: AsyncClient) -> str:
        writing = asyncio.create_task(client.put(bucket, "key", b"content", {}))
        await process.is_held()
        assert not writing.done()
        await process.go_on(told(s3.admin))
        return await writing

    assert with_client(keyless, write)


@pytest.mark.parametrize("valid_for", [None, timedelta(hours=1)], ids=str)
def test_once_fetched_they_sign_without_a_process_and_without_a_thread(
    s3: EmbeddedS3,
    keyless: StorageSettings,
    bucket: str,
    tmp_path: Path,
    valid_for: timedelta | None,
) -> None:
    process = Process(tmp_path, told(s3.admin, valid_for), held_from=NEVER)

    async def write_thrice(client: AsyncClient) -> None:
        await client.put(bucket, "key", b"content", {})
        client._threads.shutdown()  # whoever needs one from now on fails
        await client.put(bucket, "key", b"content", {})
        await client.put(bucket, "key", b"content", {})

    with_client(keyless, write_thrice)

    assert process.runs == 1


def test_a_keypair_signs_without_a_thread(storage: StorageSettings, bucket: str) -> None:
    async def write_and_read(client: AsyncClient) -> bytes:
        client._threads.shutdown()
        await client.put(bucket, "key", b"content", {})
        return (await client.get(bucket, "key", limit=100)).body

    assert with_client(storage, write_and_read) == b"content"


def test_renewing_them_holds_up_nobody_either_and_is_done_once(
    s3: EmbeddedS3, keyless: StorageSettings, bucket: str, tmp_path: Path
) -> None:
    """The first ones are found, and renewed at once since they are due; at the next use they are due again."""
    process = Process(tmp_path, told(s3.admin, timedelta(minutes=5)), held_from=3)

    async def write_thrice(client: AsyncClient) -> None:
        await client.put(bucket, "key", b"content", {})
        writing = asyncio.create_task(client.put(bucket, "key", b"content", {}))
        await process.is_held()
        assert not writing.done()
        await process.go_on(told(s3.admin, timedelta(hours=1)))
        await writing
        await client.put(bucket, "key", b"content", {})

    with_client(keyless, write_thrice)

    assert process.runs == 3


@pytest.mark.parametrize("requests", [1, SIGNING_THREADS + 1])
def test_closing_ends_those_who_wait_for_them_in_words_and_opens_no_connection(
    tmp_path: Path, requests: int
) -> None:
    process = Process(tmp_path, "", held_from=1)

    async def ask_and_close() -> list[object]:
        client = AsyncClient(StorageSettings(endpoint_url=server.endpoint_url))
        asked = [
            asyncio.create_task(client.get("bucket", "key", limit=100)) for _ in range(requests)
        ]
        await process.is_held()
        await client.close()
        await process.go_on(told(Keypair("key", "hunter2")))
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert client._session is None
        return [*ended]

    with Answering(in_turn(found())) as server:
        ended = asyncio.run(ask_and_close())

        assert server.connections == 0
    assert [type(end) for end in ended] == requests * [S3Error]
    assert {str(end).partition(".")[0] for end in ended} == {"the client is closed"}


def test_without_any_credentials_that_is_what_is_said(keyless: StorageSettings) -> None:
    with pytest.raises(S3Error, match="no credentials were found") as caught:
        get(keyless, "bucket", "key")

    assert caught.value.code == ""
    assert str(caught.value) == str(explain(botocore_errors.NoCredentialsError()))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_PROFILE", "nowhere"), ("HTTP_PROXY", "socks5://me:hunter2@proxy:1080")],
)
def test_a_variable_that_is_wrong_is_named_when_the_client_is_made(
    keyless: StorageSettings, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(SettingsError, match=variable):
        AsyncClient(keyless)
