"""500 predictions from 64 callers while the worker is killed twice and the gateway restarted: each comes to one end.

Real parts: `python -m gateway`, Cog's server, S3's wire protocol, a runner that stores an image for each prediction
with the product's own store and notes which life of the worker began it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from images.encode import read_metadata
from images.prediction import PredictionRecord, parse_record
from tests.support.asgi import HOST
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import GatewayServer, small_runner
from tests.support.load_callers import Crowd, input_of, way_of
from tests.support.receiver import Receiver, receiver

PREDICTIONS = 500
CALLERS = 64
SLOTS = 16
# Fewer than there are callers, so that some are refused and come again.
QUEUE = 32
GATEWAY_STOPS_WITHIN_S = 60
# What is wrong hangs; what is right is over in a minute, or two where a webhook was owed by a gateway that was killed:
# the next one waits for a minute and a half, as the other may be telling it at this moment.
HANGS_AFTER_S = 240
RUNNER = REPOSITORY / "tests" / "support" / "runner_for_gateway_load.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(HANGS_AFTER_S + 25)]


@dataclass
class Scene:
    """What is killed, and what may be made again for that."""

    environment: dict[str, str]
    bucket: str
    s3: Any
    journal: Path
    folder: Path
    stack: ExitStack
    gateway: GatewayServer
    killed: dict[str, set[str]] = field(default_factory=dict)
    """Lives of the worker that were killed, and the ids that each may have left undone."""

    def begun(self) -> list[tuple[str, str]]:
        """Id and life of each generation that has begun."""
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        return [(prediction_id, life) for prediction_id, life in map(str.split, lines)]

    def records(self) -> dict[str, PredictionRecord]:
        """All that the bucket has, by id."""
        keys = [key for key in self.listed("predictions/") if key.endswith(".json")]
        found = [parse_record(self.read(key), None, key) for key in keys]
        return {record.id: record for record in found}

    def listed(self, prefix: str = "") -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        data: bytes = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def kill_worker(self) -> None:
        """What it had in hand is lost, and that is one prediction a slot at most."""
        life = self.gateway.worker_pid()
        os.kill(life, signal.SIGKILL)
        self.killed[str(life)] = {which for which, where in self.begun() if where == str(life)}

    def kill_gateway(self) -> None:
        """Its worker dies with it; what is lost is what that had begun and no record says the end of."""
        life = self.gateway.worker_pid()
        self.gateway.kill()
        finished = {which for which, record in self.records().items() if record.finished}
        begun = {which for which, where in self.begun() if where == str(life)}
        self.killed[str(life)] = begun - finished
        self._start_again()

    def stop_gateway(self) -> None:
        """It finishes what runs, and gives back what waits: nothing is lost."""
        self.gateway.terminate()
        self.gateway.process.wait(GATEWAY_STOPS_WITHIN_S)
        assert self.gateway.process.returncode == 0, self.gateway.logs[-4000:]
        self._start_again()

    def _start_again(self) -> None:
        self.gateway = self.stack.enter_context(
            GatewayServer(self.environment, self.folder, port=self.gateway.port)
        )


@pytest.fixture
def hooks() -> Any:
    with receiver() as receiving:
        yield receiving


@pytest.fixture
def scene(s3: EmbeddedS3, gateway_environment: dict[str, str], tmp_path: Path) -> Any:
    journal = tmp_path / "journal.txt"
    environment = {
        **gateway_environment,
        "JOURNAL": str(journal),
        "COG_MAX_CONCURRENCY": str(SLOTS),
        "QUEUE_SIZE": str(QUEUE),
        "ALLOW_PRIVATE_HOSTS": HOST,
    }
    folder = small_runner(tmp_path / "runner", RUNNER)
    with ExitStack() as stack:
        gateway = stack.enter_context(GatewayServer(environment, folder))
        bucket = environment["PUBLIC_BUCKET_NAME"]
        yield Scene(environment, bucket, s3.client(), journal, folder, stack, gateway)


async def play(scene: Scene, crowd: Crowd, ids: list[str], restart: Any) -> None:
    """The restart first: after a SIGKILL leases have to end, which may as well be waited for meanwhile."""
    try:
        async with asyncio.timeout(HANGS_AFTER_S), asyncio.TaskGroup() as group:
            group.create_task(crowd.all(ids, CALLERS))
            for share, happens in (
                (0.2, restart),
                (0.45, scene.kill_worker),
                (0.7, scene.kill_worker),
            ):
                await crowd.reached(int(share * PREDICTIONS))
                await asyncio.to_thread(happens)
    except TimeoutError:
        hang = {
            which: scene.gateway.get(f"/predictions/{which}").text
            for which in ids
            if which not in crowd.ended
        }
        raise AssertionError(f"these did not end: {hang}") from None


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_every_prediction_of_a_rush_comes_to_one_end_whatever_dies_meanwhile(
    scene: Scene, hooks: Receiver, end: str
) -> None:
    ids = [f"load-{number}" for number in range(PREDICTIONS)]
    crowd = Crowd(scene.gateway.url, hooks.url)
    restart = scene.stop_gateway if end == "SIGTERM" else scene.kill_gateway

    asyncio.run(play(scene, crowd, ids, restart))

    print(
        f"met: {dict(crowd.met)}; killed: { {life: len(lost) for life, lost in scene.killed.items()} }"
    )
    assert len(scene.killed) == (2 if end == "SIGTERM" else 3)
    assert crowd.met["429"], "nobody was refused: the line was never full"
    each_has_one_recorded_result(scene, crowd, ids)
    no_image_is_lost_and_none_made_again_without_need(scene, ids)
    all_are_listed_once(scene, ids)
    whoever_wanted_to_be_told_was(hooks, [which for which in ids if way_of(which) == "is told"])


def each_has_one_recorded_result(scene: Scene, crowd: Crowd, ids: list[str]) -> None:
    records = scene.records()
    assert sorted(records) == sorted(ids)
    for which in ids:
        record, answer = records[which], crowd.ended[which]
        assert record.status == answer["status"] == "succeeded", f"{which}: {answer}"
        assert record.input == input_of(which)
        assert [key_of(url, scene.bucket) for url in answer["output"]] == [
            key_of(url, scene.bucket) for url in outputs(record)
        ]


def no_image_is_lost_and_none_made_again_without_need(scene: Scene, ids: list[str]) -> None:
    """One is begun again only where its worker was killed under it: alone, or together with its gateway.

    A worker that dies loses at most what fills its slots. A gateway that dies may have heard the end of more, and not
    recorded it yet: of those only what no record said to be finished may be made again.
    """
    lives: dict[str, list[str]] = defaultdict(list)
    for which, life in scene.begun():
        lives[which].append(life)
    assert sorted(lives) == sorted(ids)
    again: Counter[str] = Counter()
    for which, begun_in in lives.items():
        assert len(set(begun_in)) == len(begun_in), f"{which} was begun twice in one life"
        for life in begun_in[:-1]:
            assert which in scene.killed.get(life, ()), f"{which} was begun again: {begun_in}"
            again[life] += 1
    print(f"made again, by the life that was killed: {dict(again)}")
    for life in list(scene.killed)[-2:]:
        assert again[life] <= SLOTS

    images: dict[str, set[str]] = defaultdict(set)
    for key in scene.listed():
        if key.endswith(".png"):
            images[read_metadata(scene.read(key))["prompt"]].add(key)
    for which, record in scene.records().items():
        stored = images[input_of(which)["prompt"]]
        assert {key_of(url, scene.bucket) for url in outputs(record)} <= stored
        # An image that was stored a moment before its worker was killed stays where it is.
        assert 1 <= len(stored) <= len(lives[which]), (which, stored, lives[which])


def all_are_listed_once(scene: Scene, ids: list[str]) -> None:
    listed: list[str] = []
    before: str | None = None
    while True:
        query = {"limit": 100} | ({"before": before} if before else {})
        page: Any = scene.gateway.get("/predictions", params=query).json()
        listed += [answer["id"] for answer in page["predictions"]]
        before = page["before"]
        if before is None:
            break
    assert sorted(listed) == sorted(ids)
    url = scene.gateway.get(f"/predictions/{ids[0]}").json()["output"][0]
    assert httpx.get(url, trust_env=False).content.startswith(b"\x89PNG")


def whoever_wanted_to_be_told_was(hooks: Receiver, ids: list[str]) -> None:
    """Once at least, and always under one webhook-id for one end, by which a receiver knows a second telling."""

    def told() -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for message in list(hooks.messages):
            assert message.answer["status"] == "succeeded"
            found[message.answer["id"]].add(message.id)
        return found

    hooks.wait_until(lambda: len(told()) == len(ids), HANGS_AFTER_S)
    assert sorted(told()) == sorted(ids)
    assert all(len(webhook_ids) == 1 for webhook_ids in told().values())


def outputs(record: PredictionRecord) -> list[str]:
    assert isinstance(record.output, list)
    assert len(record.output) == 1
    return [str(url) for url in record.output]


def key_of(url: str, bucket: str) -> str:
    """Without what signs it, which is new each time."""
    return url.partition("?")[0].partition(f"/{bucket}/")[2]
