"""What happened is what a scrape says, in bounded labels, whatever callers, Cog or an old file sent."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics

from gateway.cog_status import State, Status
from gateway.gauges import MOST_VERSIONS
from gateway.metrics import MOST_ROUTES
from gateway.start_facts import MOST_PHASES, StartFacts, read_start
from tests.gateway.scraped import (
    SINCE,
    VERSION,
    Desk,
    answer,
    cold_start,
    new_metrics,
    play,
    samples,
)
from weights.waterfall import JSON_NAME, ColdStart

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_request_is_counted_by_method_route_and_status() -> None:
    metrics = new_metrics()

    for status in (200, 200, 409):
        metrics.http("PUT", "/predictions/{prediction_id}", status, 0.25)

    seen = samples(metrics)
    labels = 'method="PUT",route="/predictions/{prediction_id}"'
    assert seen[f'gateway_http_requests_total{{{labels},status="200"}}'] == 2
    assert seen[f'gateway_http_requests_total{{{labels},status="409"}}'] == 1
    assert seen[f"gateway_http_request_duration_seconds_sum{{{labels}}}"] == 0.75


def test_a_prediction_is_counted_with_its_images_wait_and_stages() -> None:
    metrics = new_metrics()

    metrics.prediction(answer(), source="replicate", waited_s=4.0, ran_s=0.9)

    seen = samples(metrics)
    assert seen['gateway_predictions_total{source="replicate",status="succeeded"}'] == 1
    assert seen["gateway_images_total"] == 2
    assert seen["gateway_prediction_wait_seconds_sum"] == 4.0
    assert seen['gateway_prediction_wait_seconds_bucket{le="3.0"}'] == 0
    assert seen['gateway_prediction_wait_seconds_bucket{le="5.0"}'] == 1
    assert seen['gateway_prediction_run_seconds_sum{status="succeeded"}'] == 0.9
    assert seen['gateway_prediction_stage_seconds_sum{stage="denoise"}'] == 0.4
    assert seen['gateway_prediction_stage_seconds_count{stage="upload"}'] == 1
    served = f'gateway_model_version_last_served_timestamp_seconds{{version="{VERSION}"}}'
    assert seen[served] > SINCE.timestamp()


def test_a_failed_prediction_counts_no_image() -> None:
    metrics = new_metrics()

    metrics.prediction(
        answer(status="failed", output=None, metrics={}), source="cog", waited_s=0.0, ran_s=1.0
    )

    seen = samples(metrics)
    assert seen['gateway_predictions_total{source="cog",status="failed"}'] == 1
    assert seen["gateway_images_total"] == 0
    assert seen['gateway_prediction_stage_seconds_count{stage="denoise"}'] == 0


@pytest.mark.parametrize(
    "timings",
    [None, "fast", 3, [], {"denoise": None}, {"denoise": "1.0"}, {"denoise": True}]
    + [{"denoise": value} for value in (float("nan"), float("inf"), -1.0, 10**400)]
    + [{"a stage of tomorrow": 1.0}],
)
def test_a_stage_time_that_is_none_is_left_out(timings: Any) -> None:
    metrics = new_metrics()

    metrics.prediction(answer(metrics={"timings": timings}), source="cog", waited_s=0, ran_s=1)

    seen = samples(metrics)
    assert seen['gateway_predictions_total{source="cog",status="succeeded"}'] == 1
    assert seen['gateway_prediction_stage_seconds_count{stage="denoise"}'] == 0
    assert not [name for name in seen if "tomorrow" in name]


@given(st.dictionaries(st.sampled_from(["status", "output", "metrics"]), JSON), JSON, JSON)
def test_nothing_that_is_json_can_break_a_scrape(
    odd: dict[str, Any], document: Any, timings: Any
) -> None:
    metrics = new_metrics()

    metrics.prediction(odd, source="cog", waited_s=float("nan"), ran_s=-1.0)
    metrics.prediction(
        {"metrics": {"timings": timings, "model_version": timings}}, source="", waited_s=0, ran_s=0
    )
    metrics.cold_start(document)
    metrics.cold_start({"phases": document, "critical_path": [document], "counters": timings})

    assert samples(metrics)["gateway_prediction_wait_seconds_count"] == 2
    metrics.close()


def test_half_a_character_in_a_document_does_not_break_a_scrape() -> None:
    metrics = new_metrics()

    metrics.cold_start(json.loads('{"model": "a\\ud800", "version": "b\\ud800"}'))
    metrics.http("GET", "/\ud800", 200, 0.1)

    assert samples(metrics)['gateway_model_info{model="a?",version="b?"}'] == 1


def test_strange_labels_become_other_and_never_grow_without_end() -> None:
    metrics = new_metrics()

    for number in range(MOST_ROUTES + 50):
        metrics.http(f"METHOD{number}", f"/page/{number}", 200, 0.1)
        metrics.refused(f"reason {number}")  # type: ignore[arg-type]
        metrics.webhook(f"event {number}", delivered=True)  # type: ignore[arg-type]
        metrics.prediction(
            answer(status=f"status {number}", metrics={"model_version": f"v{number}"}),
            source=f"source {number}",
            waited_s=0,
            ran_s=0,
        )

    seen = samples(metrics)
    other = 'gateway_http_requests_total{method="other",route="other",status="200"}'
    assert seen[other] == 50
    assert seen['gateway_refusals_total{reason="other"}'] == MOST_ROUTES + 50
    assert seen['gateway_predictions_total{source="other",status="other"}'] == MOST_ROUTES + 50
    assert len([name for name in seen if "last_served" in name]) == MOST_VERSIONS
    assert len([name for name in seen if "http_requests_total" in name]) == MOST_ROUTES + 1


def test_nothing_of_a_caller_is_in_a_scrape() -> None:
    metrics = new_metrics()
    play(metrics)

    body = metrics.exposition("")[0].decode()

    assert not [text for text in ("fox", "made-up-id", "s3.example", "X-Amz") if text in body]


def test_what_has_not_happened_yet_is_there_as_zero() -> None:
    seen = samples(new_metrics())

    assert seen['gateway_refusals_total{reason="queue_full"}'] == 0
    assert seen['gateway_predictions_total{source="cog",status="failed"}'] == 0
    assert seen['gateway_webhooks_total{event="completed",outcome="failed"}'] == 0


def test_the_queue_and_cogs_state_are_read_at_each_scrape() -> None:
    desk = Desk(waiting=3, running=16)
    metrics = new_metrics(desk)
    before = samples(metrics)

    desk.waiting = 0
    desk.status = Status(State.DEAD, SINCE, restarts=2)

    assert before["gateway_predictions_waiting"] == 3
    assert before["gateway_predictions_running"] == before["gateway_slots"] == 16
    assert (before['gateway_state{state="ready"}'], before["gateway_cog_restarts_total"]) == (1, 0)
    after = samples(metrics)
    assert after["gateway_predictions_waiting"] == 0
    assert after['gateway_state{state="dead"}'] == 1
    assert sum(value for name, value in after.items() if name.startswith("gateway_state{")) == 1
    assert after["gateway_cog_restarts_total"] == 2
    assert after["gateway_state_since_timestamp_seconds"] == SINCE.timestamp()


def test_the_cold_start_and_the_weights_are_told_in_seconds_and_bytes() -> None:
    metrics = new_metrics()

    metrics.cold_start(cold_start())

    seen = samples(metrics)
    assert seen[f'gateway_model_info{{model="ByteDance/SDXL-Lightning",version="{VERSION}"}}'] == 1
    assert seen["gateway_cold_start_ready_seconds"] == 12.5
    assert seen["gateway_cold_start_timestamp_seconds"] == SINCE.timestamp()
    assert seen['gateway_cold_start_phase_seconds{phase="warm-up"}'] == 4.0
    assert seen['gateway_cold_start_waited_seconds{phase="bytes"}'] == pytest.approx(6.9)
    assert seen["gateway_weights_bytes"] == 7e9
    assert seen["gateway_weights_read_seconds"] == 7.0
    assert seen["gateway_weights_read_bytes_per_second"] == 1e9
    assert seen['gateway_weights_source_bytes{source="network"}'] == 7.1e9
    assert seen['gateway_weights_read_events{event="retries"}'] == 3
    assert seen["gateway_weights_connections"] == 32


def test_a_start_that_is_gone_is_no_longer_told() -> None:
    metrics = new_metrics()
    metrics.cold_start(cold_start())

    metrics.cold_start(None)

    assert not [name for name in samples(metrics) if "cold_start" in name or "weights" in name]


def test_the_file_that_a_start_leaves_is_understood(tmp_path: Path) -> None:
    started = ColdStart(100.0, model="me/model", version="v1")
    with started.phase("manifest"):
        pass
    started.add("bytes", 101.0, 103.0, after=("manifest",), bytes=10**6, source="s3://b/me/model")
    started.count("network_bytes", 10**6)
    started.count("retries")
    started.ready()
    started.write(tmp_path)
    document = json.loads((tmp_path / JSON_NAME).read_text())

    facts = read_start(document)

    assert (facts.model, facts.version, facts.bytes_per_second) == ("me/model", "v1", 500_000)
    assert facts.phases["bytes"] == 2.0
    assert facts.ready_after_s == document["ready_after_s"]
    assert facts.started_at == datetime.fromisoformat(document["started_at"]).timestamp()
    assert sum(facts.waited.values()) > 0
    assert facts.bytes_from == {"network": 10**6}
    assert facts.reads == {"retries": 1}


@pytest.mark.parametrize("document", [None, [], "text", 3, {}, {"phases": [None, {"name": "x"}]}])
def test_a_document_that_is_none_tells_nothing(document: Any) -> None:
    assert read_start(document) == StartFacts()


def test_a_version_that_served_lately_is_kept_before_those_that_did_not() -> None:
    metrics = new_metrics()

    for version in (
        "first",
        *(f"v{number}" for number in range(MOST_VERSIONS - 1)),
        "first",
        "new",
    ):
        metrics.prediction(
            answer(metrics={"model_version": version}), source="cog", waited_s=0, ran_s=0
        )

    seen = "".join(name for name in samples(metrics) if "last_served" in name)
    assert 'version="first"' in seen
    assert 'version="new"' in seen
    assert 'version="v0"' not in seen


def test_a_document_with_thousands_of_phases_does_not_make_as_many_series() -> None:
    phases = [{"name": f"p{number}", "start_s": 0, "end_s": 1} for number in range(5000)]

    facts = read_start({"phases": phases})

    assert len(facts.phases) == MOST_PHASES


def test_a_phase_that_goes_on_has_no_length_yet() -> None:
    phases = [
        {"name": "manifest", "start_s": 0, "end_s": 1},
        {"name": "bytes", "start_s": 1, "end_s": 3, "bytes": 5, "in_progress": True},
    ]

    facts = read_start({"phases": phases})

    assert facts.phases == {"manifest": 1}
    assert facts.weights_bytes is None


def test_openmetrics_is_given_to_who_accepts_it() -> None:
    metrics = new_metrics()
    play(metrics)

    body, content_type = metrics.exposition("application/openmetrics-text;version=1.0.0,*/*;q=0.1")

    assert content_type.startswith("application/openmetrics-text")
    families = {f.name for f in openmetrics.text_string_to_metric_families(body.decode())}
    assert {"gateway_predictions", "gateway_gpu_memory_used_bytes"} <= families
    assert metrics.exposition("")[1].startswith("text/plain; version=0.0.4")


def test_a_version_that_is_none_gets_the_plain_format() -> None:
    metrics = new_metrics()
    plain = metrics.exposition("")[1]
    for version in ("none", "9" * 5000):
        accepted = f"application/openmetrics-text;version={version}"
        assert metrics.exposition(accepted)[1] == plain
