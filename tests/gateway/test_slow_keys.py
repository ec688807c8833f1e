"""Where the machine's own keys sign URLs, asking it for them may take long: nobody else waits for that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from gateway.desk import Desk, Wanted
from images.prediction import PredictionRecord
from images.records import Claimed
from images.store import ImageStore
from s3 import connect
from settings import load_storage_settings
from tests.gateway.test_run import GIVEN, desk_before, until
from tests.gateway.watching import run
from tests.s3.test_signing import executable
from tests.support.aws_environment import forget_this_machine
from tests.support.records import BlockingRecords

KEY = "2026/01/01/old-0.png"


@pytest.fixture
def slow_images(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ImageStore:
    """Its keys end too soon to be used. New ones come from a program, which waits 20 s for the file `answer`."""
    forget_this_machine(monkeypatch, tmp_path)
    (tmp_path / "first").write_text(keys("ending", timedelta(minutes=1)))
    program = executable(
        tmp_path / "program",
        f"""cd '{tmp_path}'
        [ -e first ] && mv first given && exec cat given
        touch started
        for _ in $(seq 400); do [ -e answer ] && exec cat answer; sleep 0.05; done
        exit 1""",
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    variables = s3.environment()
    keyless = load_storage_settings(
        {name: variables[name] for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION")}
    )
    return ImageStore(connect(keyless), bucket)


def keys(access_key_id: str, lifetime: timedelta) -> str:
    return json.dumps(
        {
            "Version": 1,
            "AccessKeyId": access_key_id,
            "SecretAccessKey": "secret",
            "SessionToken": "token",
            "Expiration": (datetime.now(UTC) + lifetime).isoformat(),
        }
    )


@pytest.fixture
def old(s3: EmbeddedS3, bucket: str, records: BlockingRecords) -> None:
    """A prediction that was made before, with a URL that ends."""
    url = s3.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": KEY})
    record = PredictionRecord.of("old", GIVEN, created_at=datetime.now(UTC))
    claimed = records.claim(record)
    assert isinstance(claimed, Claimed)
    records.enter(claimed.record)
    records.finish(claimed, "succeeded", output=[url])


async def got(desk: Desk) -> Any:
    return await desk.get("old")


async def listed(desk: Desk) -> Any:
    (answer,), _ = await desk.recent(10, None)
    return answer


async def asked_for_again(desk: Desk) -> Any:
    return (await desk.submit(Wanted(GIVEN, id="old"))).answer()


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("ask", [got, listed, asked_for_again])
def test_keys_that_take_long_hold_up_nobody_else(
    s3: EmbeddedS3,
    bucket: str,
    slow_images: ImageStore,
    tmp_path: Path,
    ask: Callable[[Desk], Awaitable[Any]],
) -> None:
    """The program is given its answer by the event loop, after it has been started."""

    async def never(writer: asyncio.StreamWriter) -> None:
        raise AssertionError("it was made before")

    async def test() -> None:
        async with desk_before(s3, bucket, never, images=slow_images, keys_may_block=True) as desk:
            asking = asyncio.ensure_future(ask(desk))
            await until((tmp_path / "started").exists)
            assert not asking.done()
            (tmp_path / "renewed").write_text(keys("renewed", timedelta(hours=1)))
            (tmp_path / "renewed").rename(tmp_path / "answer")
            answer = await asking
        (url,) = answer["output"]
        assert f"/{bucket}/{KEY}?" in url
        assert "X-Amz-Credential=renewed%2F" in url

    run(test)
