"""A bucket in another region is asked for there once S3 has said so; where that does not help, S3's words stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from s3 import explain_answer
from s3.async_client import AsyncClient, S3Error
from settings import StorageSettings
from tests.s3.test_async_client import get, put, with_client
from tests.s3.test_async_client_faults import (
    CONTENT,
    Answer,
    Answering,
    found,
    pauses,
    storage_at,
)
from tests.support.object_server import Head, s3_error, status_line

__all__ = ["pauses"]  # fixtures: pytest finds them by their names

HOME, AWAY = "auto", "eu-west-1"  # the first is what is signed for where no region is set


def malformed(region: str) -> bytes:
    return s3_error(
        400,
        "AuthorizationHeaderMalformed",
        f"the region is wrong; expecting '{region}'",
        details=f"<Region>{region}</Region>",
    )


def redirect(region: str) -> bytes:
    """Without a body, as servers answer HEAD and some answer everything."""
    fields = (("x-amz-bucket-region", region), ("Content-Length", "0"))
    return Head(status_line(301), fields).encode()


Naming = Callable[[str], bytes]
NAMING = pytest.mark.parametrize("naming", [malformed, redirect])
UNNAMED = {
    "AuthorizationHeaderMalformed": s3_error(400, "AuthorizationHeaderMalformed", "wrong"),
    "PermanentRedirect": s3_error(301, "PermanentRedirect", "elsewhere"),
    "TemporaryRedirect": s3_error(307, "TemporaryRedirect", "elsewhere"),
}


def signed_for(head: Head) -> str:
    """The region in the scope of the signature: Credential=key/day/region/s3/aws4_request."""
    return (head.get("authorization") or "").split("/")[2]


def asked(server: Answering) -> list[tuple[str, str]]:
    """The bucket and the region of each request."""
    return [(head.start.split("/")[1], signed_for(head)) for head in server.heads]


def away_is_in(region: str, naming: Naming) -> Answer:
    """The bucket `away` is in that region; every other is wherever it is asked for."""

    def answer(head: Head, _: int) -> bytes:
        is_right = head.start.split("/")[1] != "away" or signed_for(head) == region
        return found() if is_right else naming(region)

    return answer


@NAMING
def test_a_bucket_in_another_region_is_asked_for_there_from_then_on(
    pauses: list[float], naming: Naming
) -> None:
    async def read_thrice(client: AsyncClient) -> list[bytes]:
        return [(await client.get("away", "key", limit=100)).body for _ in range(3)]

    with Answering(away_is_in(AWAY, naming)) as server:
        assert with_client(storage_at(server), read_thrice) == 3 * [CONTENT]

        assert asked(server) == [("away", HOME), *3 * [("away", AWAY)]]
    assert pauses == [0.0]


@NAMING
def test_a_write_is_sent_whole_to_the_other_region(naming: Naming) -> None:
    def answer(head: Head, number: int) -> bytes:
        if signed_for(head) != AWAY:
            return naming(AWAY)
        return Head(status_line(200), (("ETag", '"1"'), ("Content-Length", "0"))).encode()

    with Answering(answer) as server:
        assert put(storage_at(server), "away", "key", CONTENT) == '"1"'

        assert [head.length for head in server.heads] == 2 * [len(CONTENT)]


def test_other_buckets_stay_in_the_first_region() -> None:
    async def read_both(client: AsyncClient) -> None:
        for bucket in ("away", "home", "away", "home"):
            await client.get(bucket, "key", limit=100)

    with Answering(away_is_in(AWAY, malformed)) as server:
        with_client(storage_at(server), read_both)

        home, away = ("home", HOME), ("away", AWAY)
        assert asked(server) == [("away", HOME), away, home, away, home]


def test_a_region_that_is_set_is_where_the_first_request_goes() -> None:
    with Answering(away_is_in(AWAY, malformed)) as server:
        settings: StorageSettings = storage_at(server).model_copy(update={"region": AWAY})
        get(settings, "away", "key")

        assert asked(server) == [("away", AWAY)]


def in_s3s_words(error: S3Error) -> bool:
    return str(error) == str(explain_answer(error.code, "", ""))


@pytest.mark.parametrize("naming", [malformed, redirect])
@pytest.mark.parametrize(("named", "requests"), [(HOME, 1), (AWAY, 2)])
def test_a_server_that_names_the_region_it_was_asked_in_is_not_asked_again(
    naming: Naming, named: str, requests: int
) -> None:
    with Answering(lambda *_: naming(named)) as server:
        with pytest.raises(S3Error, match="the bucket is in another region") as caught:
            get(storage_at(server), "away", "key")

        assert in_s3s_words(caught.value)
        assert len(server.heads) == requests


@pytest.mark.parametrize("code", UNNAMED)
def test_a_server_that_names_no_region_is_asked_once(code: str) -> None:
    with Answering(lambda *_: UNNAMED[code]) as server:
        with pytest.raises(S3Error) as caught:
            get(storage_at(server), "away", "key")

        assert caught.value.code == code
        assert len(server.heads) == 1


def test_a_server_that_names_ever_another_region_is_given_up(pauses: list[float]) -> None:
    with Answering(lambda _, number: malformed(f"region-{number}")) as server:
        with pytest.raises(S3Error, match="the bucket is in another region"):
            get(storage_at(server), "away", "key", attempts=4)

        assert [region for _, region in asked(server)] == [
            HOME,
            *(f"region-{n}" for n in (1, 2, 3)),
        ]
