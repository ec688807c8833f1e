"""What a prediction came to outlives the gateway that made it; what it left unfinished is finished by another."""

from __future__ import annotations

import base64
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import standardwebhooks

from demo.s3 import EmbeddedS3, Fault
from images.prediction import PredictionRecord, Webhook
from images.records import Claimed
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, holding
from tests.support.receiver import receiver
from tests.support.records import BlockingRecords, storage_of

ASYNC = {"Prefer": "respond-async"}
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.txt"


@pytest.fixture
def environment(
    gateway_environment: dict[str, str], journal: Path, tmp_path: Path
) -> dict[str, str]:
    return {
        **gateway_environment,
        "JOURNAL": str(journal),
        "MARKERS": str(tmp_path),
        "ALLOW_PRIVATE_HOSTS": "127.0.0.1",
        "WEBHOOK_SIGNING_SECRET": SECRET,
    }


@pytest.fixture
def records(s3: EmbeddedS3, environment: dict[str, str]) -> BlockingRecords:
    """A gateway that is dead, as far as its records tell."""
    return BlockingRecords(storage_of(s3), environment["PUBLIC_BUCKET_NAME"])


def runs(journal: Path, prompt: str) -> int:
    return journal.read_text().splitlines().count(prompt) if journal.exists() else 0


def answer_of(gateway: GatewayServer, prediction_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = gateway.get(f"/predictions/{prediction_id}").json()
    return answer


def until_over(gateway: GatewayServer, prediction_id: str) -> dict[str, Any]:
    gateway.until(
        lambda: (
            answer_of(gateway, prediction_id).get("status") in ("succeeded", "failed", "canceled")
        )
    )
    return answer_of(gateway, prediction_id)


def left_behind(
    records: BlockingRecords, prediction_id: str, prompt: str, *, claims: int = 1, **fields: Any
) -> None:
    """A prediction whose gateway has not been heard of for longer than it said."""
    record = PredictionRecord.of(
        prediction_id, {"prompt": prompt}, created_at=datetime.now(UTC), **fields
    )
    for _ in range(claims):
        assert isinstance(records.claim(record, lease_seconds=0.0), Claimed)
    records.enter(record)


def test_a_result_outlives_its_gateway(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    with GatewayServer(environment, runner_folder) as gateway:
        first = gateway.put("kept", {"prompt": "kept"}).json()
    with GatewayServer(environment, runner_folder) as gateway:
        assert gateway.put("kept", {"prompt": "kept"}).json() == first
        assert answer_of(gateway, "kept") == first
        assert gateway.get("/predictions").json()["predictions"] == [first]
    assert runs(journal, "kept") == 1


def test_two_replicas_make_one_prediction_once_and_both_know_it(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    answers: list[httpx.Response] = []
    together = threading.Barrier(8)
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(GatewayServer(environment, runner_folder)) for _ in range(2)
        ]

        def ask(number: int) -> None:
            together.wait()
            answers.append(replicas[number % 2].put("both", {"prompt": "both"}))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        with holding(runner_folder, "both"):
            for thread in threads:
                thread.start()
            # Who came first waits for it; the others are told that it runs, whichever of the two they ask.
            replicas[0].until(lambda: len(answers) == 7)
            assert {answer.status_code for answer in answers} == {202}
        for thread in threads:
            thread.join()

        assert answers[-1].status_code == 200
        results = [until_over(replica, "both") for replica in replicas]
    assert results[0] == results[1]
    assert results[0]["status"] == "succeeded"
    assert runs(journal, "both") == 1


def test_who_streams_from_another_replica_hears_the_end(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    given = {"prompt": "far", "seconds": 1.0}
    with (
        GatewayServer(environment, runner_folder) as one,
        GatewayServer(environment, runner_folder) as other,
    ):
        one.put("far", given, headers=ASYNC)
        heard = other.put("far", given, headers={"Accept": "text/event-stream"}).text
        assert heard.startswith("event: completed")
        assert "https://images.example/far-0.png" in heard
    assert runs(journal, "far") == 1


def test_another_replica_can_cancel(environment: dict[str, str], runner_folder: Path) -> None:
    given = {"prompt": "long", "seconds": 60.0}
    with (
        GatewayServer(environment, runner_folder) as one,
        GatewayServer(environment, runner_folder) as other,
    ):
        one.put("long", given, headers=ASYNC)
        assert other.post("/predictions/long/cancel").status_code == 200
        assert until_over(one, "long")["status"] == "canceled"
        assert until_over(other, "long")["status"] == "canceled"


def test_what_is_not_finished_in_time_is_finished_by_the_next_gateway_and_told_once(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    with receiver() as hook:
        impatient = {**environment, "SHUTDOWN_GRACE_SECONDS": "0"}
        with (
            holding(runner_folder, "handed on"),
            GatewayServer(impatient, runner_folder) as gateway,
        ):
            given = {"prompt": "handed on"}
            fields = {"webhook": hook.url, "webhook_events_filter": ["completed"]}
            answer = gateway.put("handed", given, headers=ASYNC, fields=fields)
            assert answer.status_code == 202
            gateway.until(lambda: runs(journal, "handed on") == 1)
        with GatewayServer(environment, runner_folder) as gateway:
            assert until_over(gateway, "handed")["status"] == "succeeded"
            (message,) = hook.wait_for(1)
    assert runs(journal, "handed on") == 2
    assert message.answer["status"] == "succeeded"
    assert message.id == "handed-completed-0"
    standardwebhooks.Webhook(SECRET).verify(message.body, message.headers)


def test_who_waits_at_a_gateway_that_stops_is_told_to_ask_again_and_gets_it_then(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    given = {"prompt": "wait"}
    answers: list[httpx.Response] = []
    impatient = {**environment, "SHUTDOWN_GRACE_SECONDS": "0"}
    with holding(runner_folder, "wait"), GatewayServer(impatient, runner_folder) as gateway:
        asking = threading.Thread(target=lambda: answers.append(gateway.put("wait", given)))
        asking.start()
        gateway.until(lambda: runs(journal, "wait") == 1)
        gateway.terminate()
        asking.join(TIMEOUT_S)
    assert answers[0].status_code == 503
    assert "Retry-After" in answers[0].headers
    with GatewayServer(environment, runner_folder) as gateway:
        assert gateway.put("wait", given).json()["status"] == "succeeded"


def test_what_a_dead_gateway_left_is_made_where_nobody_needs_to_wait_for_it(
    environment: dict[str, str], runner_folder: Path, journal: Path, records: BlockingRecords
) -> None:
    with receiver() as hook:
        webhook = Webhook(url=hook.url)
        left_behind(records, "orphan", "orphan", background=True, webhook=webhook)
        left_behind(records, "deserted", "deserted")
        with GatewayServer(environment, runner_folder) as gateway:
            assert until_over(gateway, "orphan")["status"] == "succeeded"
            hook.wait_for(2)
            assert answer_of(gateway, "deserted")["status"] == "starting"
            # Its caller comes back for it.
            assert gateway.put("deserted", {"prompt": "deserted"}).json()["status"] == "succeeded"
    assert {message.answer["status"] for message in hook.messages} >= {"succeeded"}
    assert runs(journal, "orphan") == runs(journal, "deserted") == 1


def test_what_several_gateways_handed_back_has_ended_none_of_them_and_is_made(
    environment: dict[str, str], runner_folder: Path, journal: Path, records: BlockingRecords
) -> None:
    record = PredictionRecord.of(
        "rolled", {"prompt": "rolled"}, created_at=datetime.now(UTC), background=True
    )
    for _ in range(5):
        claimed = records.claim(record)
        assert isinstance(claimed, Claimed)
        records.hand_back(claimed)
    records.enter(record)
    with GatewayServer(environment, runner_folder) as gateway:
        assert until_over(gateway, "rolled")["status"] == "succeeded"
    assert runs(journal, "rolled") == 1


def test_what_is_asked_for_again_is_in_the_list_where_its_answer_says(
    environment: dict[str, str], runner_folder: Path, records: BlockingRecords
) -> None:
    # Its gateway died before it was entered.
    died = PredictionRecord.of(
        "again", {"prompt": "again"}, created_at=datetime(2026, 1, 2, tzinfo=UTC)
    )
    assert isinstance(records.claim(died, lease_seconds=0.0), Claimed)
    with GatewayServer(environment, runner_folder) as gateway:
        accepted = gateway.put("again", {"prompt": "again"}, headers=ASYNC)
        assert accepted.status_code == 202
        over = until_over(gateway, "again")
        listed = gateway.get("/predictions").json()["predictions"]
    assert listed == [over]
    assert over["created_at"] == accepted.json()["created_at"] > "2026-01-02"


def test_every_end_of_a_prediction_is_told_under_an_id_of_its_own(
    environment: dict[str, str], runner_folder: Path
) -> None:
    hasty = {**environment, "PREDICTION_TIMEOUT_SECONDS": "2"}
    with receiver() as hook, GatewayServer(hasty, runner_folder) as gateway:
        fields = {"webhook": hook.url, "webhook_events_filter": ["completed"]}
        with holding(runner_folder, "ends twice"):
            first = gateway.put("twice", {"prompt": "ends twice"}, fields=fields)
        second = gateway.put("twice", {"prompt": "ends twice"})
        messages = hook.wait_for(2)
    assert (first.json()["status"], second.json()["status"]) == ("failed", "succeeded")
    told = {message.id: message.answer["status"] for message in messages}
    assert told == {"twice-completed-0": "failed", "twice-completed-0-1": "succeeded"}


def test_who_is_told_that_it_goes_on_can_count_on_it_though_others_asked_first(
    environment: dict[str, str],
    runner_folder: Path,
    journal: Path,
    records: BlockingRecords,
) -> None:
    with (
        GatewayServer(environment, runner_folder) as one,
        GatewayServer(environment, runner_folder) as other,
        ThreadPoolExecutor(2) as callers,
    ):
        with holding(runner_folder, "here", "there"):
            waiting = [
                callers.submit(one.put, name, {"prompt": name}) for name in ("here", "there")
            ]
            one.until(lambda: runs(journal, "here") + runs(journal, "there") == 2)
            for gateway, name in ((one, "here"), (other, "there")):
                assert gateway.put(name, {"prompt": name}, headers=ASYNC).status_code == 202
                # Were its gateway killed now, this is what another would find.
                stored = records.get(name)
                assert stored is not None
                assert stored.record.background
                assert name in {at.record.id for at in records.recent(10).stored}
        assert [asked.result(TIMEOUT_S).json()["status"] for asked in waiting] == ["succeeded"] * 2


def test_what_goes_on_for_another_is_made_though_who_asked_first_leaves(
    environment: dict[str, str], runner_folder: Path, records: BlockingRecords
) -> None:
    with (
        GatewayServer(environment, runner_folder) as one,
        GatewayServer(environment, runner_folder) as other,
        receiver() as hook,
    ):
        fields = {"webhook": hook.url, "webhook_events_filter": ["completed"]}
        with holding(runner_folder, "left"):
            with one.asking("left", {"prompt": "left"}):
                accepted = other.put("left", {"prompt": "left"}, headers=ASYNC, fields=fields)
                assert accepted.status_code == 202
            # Neither of them may end it as its caller's wish.
            one.until(lambda: answer_of(one, "left")["status"] == "starting")
        assert until_over(other, "left")["status"] == "succeeded"
        (message,) = hook.wait_for(1)
    assert message.answer["status"] == "succeeded"
    stored = records.get("left")
    assert stored is not None
    assert (stored.record.reruns, stored.record.background) == (0, True)


def test_what_has_ended_several_gateways_is_not_tried_again_and_its_caller_told(
    environment: dict[str, str], runner_folder: Path, journal: Path, records: BlockingRecords
) -> None:
    with receiver() as hook:
        webhook = Webhook(url=hook.url, events_filter=("completed",))
        left_behind(records, "deadly", "deadly", claims=3, background=True, webhook=webhook)
        with GatewayServer(environment, runner_folder) as gateway:
            (message,) = hook.wait_for(1)
            assert answer_of(gateway, "deadly")["status"] == "failed"
    assert "3 servers ended" in message.answer["error"]
    assert runs(journal, "deadly") == 0


def test_a_prediction_survives_the_death_of_its_worker(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    with (
        GatewayServer({**environment, "COG_MAX_CONCURRENCY": "1"}, runner_folder) as gateway,
        ThreadPoolExecutor(2) as callers,
    ):
        with holding(runner_folder, "under way"):
            under_way = callers.submit(gateway.put, "under way", {"prompt": "under way"})
            gateway.until(lambda: runs(journal, "under way") == 1)
            in_line = callers.submit(gateway.put, "in line", {"prompt": "in line"})
            gateway.until(lambda: gateway.get("/status").json()["queue"]["waiting"] == 1)
            os.kill(gateway.worker_pid(), signal.SIGKILL)
        answers = [asked.result(TIMEOUT_S).json() for asked in (under_way, in_line)]
    assert [answer["status"] for answer in answers] == ["succeeded"] * 2
    assert (runs(journal, "under way"), runs(journal, "in line")) == (2, 1)


def test_a_prediction_that_kills_its_worker_again_and_again_fails(
    environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    with GatewayServer(environment, runner_folder) as gateway:
        told = gateway.put("deadly", {"prompt": "die"}).json()
        assert told["status"] == "failed"
        assert "died 3 times" in told["error"]
        gateway.until(lambda: gateway.get("/ready").is_success)
        assert gateway.put("after", {"prompt": "after"}).json()["status"] == "succeeded"
    assert runs(journal, "die") == 3


def test_what_no_later_gateway_would_find_is_not_accepted(
    s3: EmbeddedS3, environment: dict[str, str], runner_folder: Path, journal: Path
) -> None:
    bucket = environment["PUBLIC_BUCKET_NAME"]
    with GatewayServer(environment, runner_folder) as gateway:
        gateway.put("first", {"prompt": "first"})  # with which the bucket is tried
        with s3.fault(
            Fault("status", method="PUT", bucket=bucket, key="predictions/by-time/*", status=403)
        ):
            answer = gateway.put("unlisted", {"prompt": "unlisted"}, headers=ASYNC)
            assert answer.status_code == 503
        assert runs(journal, "unlisted") == 0
        # It was given back, so that asking again needs no waiting.
        answer = gateway.put("unlisted", {"prompt": "unlisted"})
        assert answer.json()["status"] == "succeeded"
