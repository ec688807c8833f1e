"""Metrics with a desk, a driver and a history of their own, for tests that scrape them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gateway.cog_status import State, Status
from gateway.gpu import Cards
from gateway.metrics import Metrics
from tests.support.nvml import Driver

SINCE = datetime(2026, 11, 26, 8, 0, tzinfo=UTC)
VERSION = "2026-11-26-3f9c2a7d1b40"


@dataclass
class Desk:
    """The five facts that a scrape asks of the gateway's desk."""

    status: Status = field(default_factory=lambda: Status(State.READY, SINCE))
    waiting: int = 0
    running: int = 0
    slots: int = 16
    queue_size: int = 100


def cold_start() -> dict[str, Any]:
    """What weights/waterfall.py leaves of a start on a card; tests/weights/test_waterfall.py holds its shape."""
    return {
        "model": "ByteDance/SDXL-Lightning",
        "version": VERSION,
        "started_at": "2026-11-26T08:00:00.000+00:00",
        "ready_after_s": 12.5,
        "phases": [
            {"name": "settings", "start_s": 0.0, "end_s": 0.5, "after": []},
            {"name": "manifest", "start_s": 0.5, "end_s": 0.6, "after": []},
            {
                "name": "bytes",
                "start_s": 0.5,
                "end_s": 7.5,
                "after": ["manifest"],
                "bytes": 7 * 10**9,
            },
            {"name": "imports", "start_s": 0.6, "end_s": 8.0, "after": ["clients"]},
            {"name": "warm-up", "start_s": 8.5, "end_s": 12.5, "after": ["build"]},
        ],
        "critical_path": [
            {"name": "settings", "start_s": 0.0, "end_s": 0.5},
            {"name": "bytes", "start_s": 0.6, "end_s": 7.5},
            {"name": "warm-up", "start_s": 8.5, "end_s": 12.5},
        ],
        "counters": {
            "total_bytes": 7 * 10**9,
            "landed_bytes": 7 * 10**9,
            "network_bytes": 7_100_000_000,
            "cache_bytes": 0,
            "folder_bytes": 0,
            "requests": 219,
            "retries": 3,
            "stalls": 0,
            "throttled": 0,
            "corrupt_chunks": 0,
            "hedges": 4,
            "hedges_won": 1,
            "connections": 32,
        },
    }


def answer(**changes: Any) -> dict[str, Any]:
    """What a caller gets of a prediction that made two images."""
    timings = {
        "wait": 0.01,
        "prompt": 0.02,
        "denoise": 0.4,
        "decode": 0.12,
        "encode": 0.2,
        "upload": 0.3,
    }
    return {
        "id": "made-up-id",
        "input": {"prompt": "a secret fox"},
        "status": "succeeded",
        "output": ["https://s3.example/a.png?X-Amz-Signature=abc", "https://s3.example/b.png"],
        "error": None,
        "logs": "",
        "metrics": {
            "seed": 7,
            "model_version": VERSION,
            "timings": timings,
            "predict_time": 0.9,
        },
    } | changes


def new_metrics(desk: Desk | None = None, driver: Driver | None = None) -> Metrics:
    """With a driver that answers, however busy this machine is."""
    return Metrics(desk or Desk(), cards=Cards(lambda: driver or Driver(), patience_s=60.0))


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of a scrape, as `name{label="value",…}` with the labels sorted."""
    body, _ = metrics.exposition("text/plain")
    return {
        written(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def written(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


def play(metrics: Metrics) -> None:
    """One of everything that can happen."""
    metrics.cold_start(cold_start())
    metrics.http("PUT", "/predictions/{prediction_id}", 200, 1.1)
    metrics.http("POST", "/predictions", 500, 0.2)
    metrics.http("GET", "/ready", 503, 0.001)
    metrics.prediction(answer(), source="cog", waited_s=0.2, ran_s=0.9)
    metrics.prediction(
        answer(status="failed", output=None, metrics={}), source="page", waited_s=0.0, ran_s=0.1
    )
    metrics.refused("queue_full")
    metrics.refused("no_key")
    metrics.refused("bucket")
    metrics.replayed()
    metrics.webhook("completed", delivered=True)
    metrics.webhook("completed", delivered=False)
