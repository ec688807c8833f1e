"""What a collector receives of a request's way through the gateway; and that without one there is nothing to pay."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.contextvars import get_contextvars

from gateway.tracing import Tracing, configure
from tests.gateway.scraped import VERSION, answer
from tests.support.otlp import Receiver, receiving

ROOT = Path(__file__).resolve().parents[2]
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SERVER, CLIENT, INTERNAL = 2, 3, 1


@contextmanager
def traced(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[tuple[Tracing, Receiver]]:
    """Tracing to a receiver; what was traced is there once the `with` is left."""
    with receiving() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        tracing = configure()
        try:
            yield tracing, received
        finally:
            tracing.close()


def test_a_requests_way_is_one_trace_that_continues_the_callers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def way(tracing: Tracing) -> None:
        waiting: asyncio.Queue[object] = asyncio.Queue()
        done = asyncio.Event()

        async def worker() -> None:  # started before the request, as a slot is
            parent = await waiting.get()
            with tracing.step("generation", parent=parent, outward=True) as generation:  # type: ignore[arg-type]
                generation.generated(answer())
            done.set()

        slot = asyncio.create_task(worker())
        headers = {"Traceparent": f"00-{TRACE}-{CALLER}-01"}
        with tracing.request("PUT", headers) as request:
            with tracing.step("claim", prediction__id="abc", claim__outcome="new"):
                pass
            with tracing.step("queue", queue__place=3):
                await waiting.put(tracing.here())
                await done.wait()
            with tracing.step("record"):
                pass
            request.answered("/predictions/{prediction_id}", 200)
        await slot

    with traced(monkeypatch) as (tracing, received):
        asyncio.run(way(tracing))

    spans = received.spans
    request = spans["PUT /predictions/{prediction_id}"]
    assert (request.trace_id, request.parent_id, request.kind) == (TRACE, CALLER, SERVER)
    assert request.attributes == {
        "http.request.method": "PUT",
        "http.route": "/predictions/{prediction_id}",
        "http.response.status_code": 200,
    }
    assert {span.trace_id for span in spans.values()} == {TRACE}
    for name in ("claim", "queue", "record"):
        assert (spans[name].parent_id, spans[name].kind) == (request.span_id, INTERNAL)
    assert spans["claim"].attributes == {"prediction.id": "abc", "claim.outcome": "new"}
    generation = spans["generation"]
    assert (generation.parent_id, generation.kind) == (spans["queue"].span_id, CLIENT)
    assert generation.attributes == {
        "prediction.status": "succeeded",
        "prediction.images": 2,
        "prediction.model_version": VERSION,
        "prediction.stage.wait_seconds": 0.01,
        "prediction.stage.prompt_seconds": 0.02,
        "prediction.stage.denoise_seconds": 0.4,
        "prediction.stage.decode_seconds": 0.12,
        "prediction.stage.encode_seconds": 0.2,
        "prediction.stage.upload_seconds": 0.3,
    }
    assert request.start <= spans["queue"].start <= generation.start <= generation.end
    assert not any(span.failed for span in spans.values())


def test_what_goes_wrong_is_told_by_its_kind_and_never_by_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with traced(monkeypatch) as (tracing, received):
        with (
            pytest.raises(ValueError, match="fox"),
            tracing.request("POST", {"authorization": "Bearer gw_secret"}) as request,
            tracing.step("webhook", outward=True),
        ):
            raise ValueError("a prompt about a fox")
        with tracing.request("GET", {}) as request:
            request.answered("/predictions/{prediction_id}", 503)
        with tracing.step("generation") as generation:
            generation.generated(answer(status="failed", error="a fox", metrics=None, output=None))

    assert received.spans["webhook"].failed
    assert received.spans["webhook"].attributes == {"error.type": "ValueError"}
    assert received.spans["POST"].attributes["error.type"] == "ValueError"
    unanswered = received.spans["GET /predictions/{prediction_id}"]
    assert (unanswered.failed, unanswered.attributes["error.type"]) == (True, "503")
    assert received.spans["generation"].attributes["error.type"] == "prediction_failed"
    assert {(span.events, span.message) for span in received.spans.values()} == {(0, "")}
    sent = b"".join(received.bodies)
    assert not [word for word in (b"fox", b"gw_secret", b"s3.example") if word in sent]


def test_a_refusal_is_no_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with traced(monkeypatch) as (tracing, received), tracing.request("BREW", {}) as request:
        request.answered("/predictions", 429)

    assert not received.spans["other /predictions"].failed


def test_log_lines_name_the_trace_while_a_request_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    with traced(monkeypatch) as (tracing, _):
        with tracing.request("GET", {"traceparent": f"00-{TRACE}-{CALLER}-01"}):
            assert get_contextvars() == {"trace_id": TRACE}
        assert get_contextvars() == {}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "lightning-in-a-bucket"),
        ({"OTEL_SERVICE_NAME": "fast"}, "fast"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=slow,zone=a"}, "slow"),
    ],
)
def test_the_service_has_the_name_it_was_given(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    with traced(monkeypatch, **variables) as (tracing, received), tracing.step("anything"):
        pass

    assert received.resource["service.name"] == name


def test_a_sampler_that_is_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        traced(monkeypatch, OTEL_TRACES_SAMPLER="always_off") as (tracing, received),
        tracing.request("GET", {}) as request,
    ):
        request.answered("/", 200)

    assert received.spans == {}


@pytest.mark.parametrize("headers", [{"traceparent": "nonsense"}, {"traceparent": ""}, {}])
def test_a_traceparent_that_is_none_begins_a_trace(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    with (
        traced(monkeypatch) as (tracing, received),
        tracing.request("GET", headers) as request,
    ):
        request.answered("/", 200)

    assert received.spans["GET /"].parent_id == ""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    ],
)
def test_without_being_asked_for_it_does_nothing_and_imports_nothing(
    variables: dict[str, str],
) -> None:
    code = f"""
import json, sys
from gateway.tracing import configure
tracing = configure({variables!r})
with tracing.request("GET", {{}}) as request, tracing.step("claim", x=1, parent=tracing.here()) as step:
    request.answered("/", 500)
    step.generated({{}})
    step.set(a=1)
    step.fail("x")
tracing.close()
print(json.dumps([name for name in sys.modules if name.startswith(("opentelemetry", "google"))]))
"""

    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert json.loads(told.stdout) == []
    assert told.stderr == ""


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            "http/protobuf",
        ),
    ],
)
def test_what_is_not_installed_is_a_warning_and_no_traces(
    caplog: pytest.LogCaptureFixture, variables: dict[str, str], remedy: str
) -> None:
    with caplog.at_level(logging.WARNING, "gateway.tracing"):
        tracing = configure(variables)

    assert type(tracing) is Tracing
    assert remedy in caplog.text


def test_a_collector_that_is_away_costs_no_request_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receiving() as gone:
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gone.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing = configure()

    with tracing.request("GET", {}) as request:
        request.answered("/", 200)
    tracing.close()

    assert gone.spans == {}
