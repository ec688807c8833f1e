"""Cog's interface through the gateway, and what Cog's own lacks: a prediction can be asked for again."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, holding, small_runner

ASYNC = {"Prefer": "respond-async"}
EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runner was made to do, a line each."""
    return tmp_path_factory.mktemp("journal") / "journal.txt"


@pytest.fixture(scope="module")
def gateway(
    s3: EmbeddedS3, journal: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    s3.create_bucket("predictions-test")
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": "predictions-test",
        "JOURNAL": str(journal),
        "COG_MAX_CONCURRENCY": "2",
        "QUEUE_SIZE": "8",
    }
    with GatewayServer(environment, small_runner(tmp_path_factory.mktemp("runner"))) as running:
        yield running


def times_run(journal: Path, prompt: str) -> int:
    return journal.read_text().splitlines().count(prompt) if journal.exists() else 0


def ended(gateway: GatewayServer, prediction_id: str) -> dict[str, Any]:
    """The prediction once it is over."""
    found: dict[str, Any] = {}

    def over() -> bool:
        answer = gateway.get(f"/predictions/{prediction_id}")
        found.clear()
        found.update(answer.json())
        return found.get("status") in ("succeeded", "failed", "canceled")

    gateway.until(over)
    return found


def events_of(answer: httpx.Response) -> list[tuple[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_a_prediction_is_answered_as_cog_does(gateway: GatewayServer) -> None:
    answer = gateway.put("plain", {"prompt": "hello", "num_outputs": 2, "seed": 3})

    assert answer.status_code == 200
    told = answer.json()
    assert told["id"] == "plain"
    assert told["status"] == "succeeded"
    assert told["input"] == {"prompt": "hello", "num_outputs": 2, "seed": 3}
    assert told["output"] == [f"https://images.example/hello-{k}.png" for k in (0, 1)]
    assert told["metrics"]["seed"] == 3
    assert told["logs"] == "running hello\n"
    assert told["created_at"] <= told["started_at"] <= told["completed_at"]


def test_an_id_is_made_where_none_is_given(gateway: GatewayServer) -> None:
    first, second = (gateway.post("/predictions", json={"input": {"prompt": "x"}}) for _ in "ab")
    assert first.status_code == second.status_code == 200
    assert first.json()["id"] != second.json()["id"]
    assert gateway.get(f"/predictions/{first.json()['id']}").json() == first.json()


def test_the_same_put_again_returns_the_result_and_runs_nothing(
    gateway: GatewayServer, journal: Path
) -> None:
    first = gateway.put("again", {"prompt": "only once"})
    second = gateway.put("again", {"prompt": "only once"})

    assert first.json() == second.json()
    assert times_run(journal, "only once") == 1


def test_many_that_put_one_id_at_once_have_it_made_once(
    gateway: GatewayServer, journal: Path
) -> None:
    together = threading.Barrier(8)
    answers: list[httpx.Response] = []

    def ask() -> None:
        together.wait()
        answers.append(gateway.put("crowd", {"prompt": "a crowd"}))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    with holding(gateway.cwd, "a crowd"):
        for thread in threads:
            thread.start()
        # Who came first waits for it; the others are told that it runs, as Cog does.
        gateway.until(lambda: len(answers) == 7)
        assert {answer.status_code for answer in answers} == {202}
    for thread in threads:
        thread.join()

    assert answers[-1].status_code == 200
    assert ended(gateway, "crowd")["status"] == "succeeded"
    assert times_run(journal, "a crowd") == 1


def test_an_id_stands_for_one_input(gateway: GatewayServer) -> None:
    gateway.put("taken", {"prompt": "one"})
    answer = gateway.put("taken", {"prompt": "another"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "id"]


def test_a_failure_is_an_answer_and_is_kept(gateway: GatewayServer, journal: Path) -> None:
    first = gateway.put("failing", {"prompt": "fail"})
    assert first.status_code == 200
    assert first.json()["status"] == "failed"
    assert "cannot do that" in first.json()["error"]

    runs = times_run(journal, "fail")
    assert gateway.put("failing", {"prompt": "fail"}).json() == first.json()
    assert times_run(journal, "fail") == runs


@pytest.mark.parametrize(
    ("given", "place", "message"),
    [
        ({}, ["body", "input", "prompt"], "Field required"),
        (
            {"prompt": "x", "num_outputs": 9},
            ["body", "input", "num_outputs"],
            "9 is greater than the maximum of 4",
        ),
    ],
)
def test_a_wrong_input_is_refused_in_cogs_words_and_leaves_the_id_free(
    gateway: GatewayServer, given: dict[str, Any], place: list[str], message: str
) -> None:
    answer = gateway.put("refused", given)
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert (detail["loc"], detail["msg"]) == (place, message)
    assert gateway.get("/predictions/refused").status_code == 404


def test_an_input_the_model_does_not_have_is_dropped(gateway: GatewayServer) -> None:
    answer = gateway.put("dropped", {"prompt": "x", "colour": "red"})
    assert answer.json()["input"] == {"prompt": "x"}


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 422),
        (b'{"input": 3}', "application/json", 422),
        (b'{"input": {"prompt": "x"}, "id": "other"}', "application/json", 422),
        (b'{"input": {"prompt": "x"}, "id": ""}', "application/json", 422),
        (b'{"input": {"prompt": "\\ud800"}}', "application/json", 422),
        (b'{"input": {"prompt": "x", "seconds": NaN}}', "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"input": {"prompt": "x"}}', "text/plain", 415),
    ],
)
def test_what_is_no_request_is_refused(
    gateway: GatewayServer, content: bytes, content_type: str, status: int
) -> None:
    answer = httpx.put(
        f"{gateway.url}/predictions/malformed",
        content=content,
        headers={"Content-Type": content_type},
        timeout=TIMEOUT_S,
        trust_env=False,
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert gateway.get("/predictions/malformed").status_code == 404


def test_an_asynchronous_one_is_accepted_and_can_be_asked_about(gateway: GatewayServer) -> None:
    with holding(gateway.cwd, "later"):
        answer = gateway.put("later", {"prompt": "later"}, headers=ASYNC)
    assert answer.status_code == 202
    assert answer.json()["status"] in ("starting", "processing")
    assert ended(gateway, "later")["output"] == ["https://images.example/later-0.png"]


def test_an_unknown_id_is_a_404(gateway: GatewayServer) -> None:
    assert gateway.get("/predictions/nobody-knows").status_code == 404
    assert gateway.post("/predictions/nobody-knows/cancel").status_code == 404


@pytest.mark.parametrize("prediction_id", ["a%2Fb", "%F0%9F%A6%8A fox", "..%2F..%2Fetc", "x" * 500])
def test_an_id_is_any_text(gateway: GatewayServer, prediction_id: str) -> None:
    answer = gateway.put(prediction_id, {"prompt": "an id"})
    assert answer.status_code == 200
    assert gateway.get(f"/predictions/{prediction_id}").json() == answer.json()


def test_an_id_has_an_end(gateway: GatewayServer) -> None:
    assert gateway.put("x" * 513, {"prompt": "an id"}).status_code == 422


def test_events_are_cogs_from_the_first_to_the_last(gateway: GatewayServer) -> None:
    answer = gateway.put("events", {"prompt": "watch me"}, headers=EVENTS)
    events = events_of(answer)
    names = [name for name, _ in events]
    assert names[0] == "start"
    assert {"log", "metric", "output"} <= set(names)
    assert names[-1] == "completed"
    assert events[-1][1] == gateway.get("/predictions/events").json()


def test_events_of_a_finished_one_are_its_end(gateway: GatewayServer) -> None:
    first = events_of(gateway.put("events twice", {"prompt": "w"}, headers=EVENTS))
    again = events_of(gateway.put("events twice", {"prompt": "w"}, headers=EVENTS))
    assert again == [first[-1]]


def test_who_comes_later_hears_it_from_the_first_event(
    gateway: GatewayServer, journal: Path
) -> None:
    given = {"prompt": "join"}
    with contextlib.ExitStack() as stack:
        with holding(gateway.cwd, "join"):
            gateway.put("joined", given, headers=ASYNC)
            gateway.until(lambda: times_run(journal, "join") == 1)
            lines = stack.enter_context(gateway.asking("joined", given))
        told = list(lines)
    completed = told[told.index("event: completed") + 1].removeprefix("data: ")
    assert json.loads(completed)["status"] == "succeeded"


def test_a_running_one_is_cancelled(gateway: GatewayServer) -> None:
    gateway.put("unwanted", {"prompt": "u", "seconds": 60}, headers=ASYNC)
    gateway.until(lambda: gateway.get("/predictions/unwanted").json()["status"] == "processing")

    assert gateway.post("/predictions/unwanted/cancel").status_code == 200

    assert ended(gateway, "unwanted")["status"] == "canceled"
    again = gateway.put("unwanted", {"prompt": "u", "seconds": 60})
    assert again.json()["status"] == "canceled"  # somebody wanted that


def test_a_waiting_one_is_cancelled_and_never_runs(gateway: GatewayServer, journal: Path) -> None:
    for name in ("slot-1", "slot-2"):
        gateway.put(name, {"prompt": name, "seconds": 60}, headers=ASYNC)
    gateway.put("in line", {"prompt": "never", "seconds": 0}, headers=ASYNC)
    assert gateway.get("/status").json()["queue"] == {
        "waiting": 1,
        "running": 2,
        "slots": 2,
        "size": 8,
    }

    gateway.post("/predictions/in line/cancel")

    assert ended(gateway, "in line")["status"] == "canceled"
    for name in ("slot-1", "slot-2"):
        gateway.post(f"/predictions/{name}/cancel")
        ended(gateway, name)
    assert times_run(journal, "never") == 0


def test_who_hangs_up_cancels_and_may_ask_again(gateway: GatewayServer, journal: Path) -> None:
    given = {"prompt": "patience"}
    with holding(gateway.cwd, "patience"):
        with gateway.sent("left", given):
            gateway.until(lambda: times_run(journal, "patience") == 1)
        left = ended(gateway, "left")
    assert left["status"] == "canceled"
    assert "caller" in left["error"]

    answer = gateway.put("left", given)

    assert answer.status_code == 200
    assert answer.json()["status"] == "succeeded"
    assert times_run(journal, "patience") == 2


def test_an_asynchronous_one_goes_on_without_its_reader(gateway: GatewayServer) -> None:
    with httpx.stream(
        "PUT",
        f"{gateway.url}/predictions/unread",
        json={"input": {"prompt": "unread", "seconds": 0.5}},
        headers={**ASYNC, **EVENTS},
        timeout=TIMEOUT_S,
        trust_env=False,
    ) as answer:
        next(answer.iter_lines())
    assert ended(gateway, "unread")["status"] == "succeeded"


def test_the_list_has_the_newest_first_and_goes_on_where_it_ended(gateway: GatewayServer) -> None:
    for name in ("listed-1", "listed-2", "listed-3"):
        gateway.put(name, {"prompt": name})

    first = gateway.get("/predictions?limit=2").json()
    then = gateway.get(f"/predictions?limit=2&before={first['before']}").json()

    ids = [told["id"] for told in first["predictions"] + then["predictions"]]
    assert ids[:3] == ["listed-3", "listed-2", "listed-1"]


def test_the_model_s_own_document_is_served_without_what_only_its_operator_may(
    gateway: GatewayServer,
) -> None:
    document = gateway.get("/openapi.json").json()
    inputs = document["components"]["schemas"]["Input"]["properties"].keys()
    assert inputs >= {"prompt", "seconds", "seed", "num_outputs"}
    assert {"get", "post"} <= document["paths"]["/predictions"].keys()
    assert "/shutdown" not in document["paths"]
    assert gateway.post("/shutdown").status_code in (404, 405)


@pytest.mark.parametrize(
    "prediction_id", ["a/b", "../../../outside", "{folder}/outside", "a\0b", "x" * 300, "é" * 512]
)
def test_an_id_may_be_any_text_and_costs_cog_neither_a_slot_nor_a_folder_elsewhere(
    gateway: GatewayServer, tmp_path: Path, prediction_id: str
) -> None:
    """Cog 0.23 makes a folder of that name, and where it cannot, loses the slot: more ids than there are slots."""
    prediction_id = prediction_id.format(folder=tmp_path)
    for attempt in range(3):
        answer = gateway.post(
            "/predictions",
            json={"id": f"{prediction_id}{attempt}"[-512:], "input": {"prompt": "odd"}},
        )
        assert answer.status_code == 200
        assert answer.json()["id"] == f"{prediction_id}{attempt}"[-512:]
        assert answer.json()["status"] == "succeeded"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "body",
    [
        '{"input": {"prompt": "x", "seed": 1%s}}' % ("0" * 400),
        '{"input": {"prompt": "x"}, "context": {"a": NaN}}',
        '{"input": {"prompt": "x"}, "context": {"a": "\\ud800"}}',
    ],
)
def test_what_cog_cannot_read_is_refused_and_holds_no_slot(
    gateway: GatewayServer, body: str
) -> None:
    answer = gateway.post(
        "/predictions", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert gateway.get("/status").json()["queue"]["running"] == 0
