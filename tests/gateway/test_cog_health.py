"""What Cog's health check says is understood, and what it does not say is not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.cog_health import Condition, read_health


@pytest.mark.parametrize(
    ("status", "condition"),
    [
        ("UNKNOWN", Condition.STARTING),
        ("STARTING", Condition.STARTING),
        ("READY", Condition.READY),
        ("BUSY", Condition.BUSY),
        ("SETUP_FAILED", Condition.SETUP_FAILED),
        ("DEFUNCT", Condition.WORKER_DEAD),
        ("UNHEALTHY", Condition.WORKER_DEAD),
    ],
)
def test_every_status_of_cog_has_a_meaning(status: str, condition: Condition) -> None:
    assert read_health({"status": status}).condition is condition


@pytest.mark.parametrize(
    ("explanation", "condition"),
    [
        ("Healthcheck error: protocol error: healthcheck channel closed", Condition.WORKER_DEAD),
        ("Healthcheck error: healthcheck timed out", Condition.WORKER_SLOW),
    ],
)
def test_a_slow_worker_is_not_a_dead_one(explanation: str, condition: Condition) -> None:
    health = read_health({"status": "UNHEALTHY", "user_healthcheck_error": explanation})

    assert health.condition is condition
    assert health.explanation == explanation


@pytest.mark.parametrize(
    "body", [None, [], "READY", {}, {"status": None}, {"status": "FINE"}, {"status": ["READY"]}]
)
def test_anything_else_is_an_error(body: Any) -> None:
    with pytest.raises(ValueError, match="the answer names"):
        read_health(body)


def test_a_failed_setup_tells_the_runner_s_own_error() -> None:
    logs = (
        "worker setup failed: worker setup failed (slot ccb57599-dff6-4805-9d3f-7530cb3b3f4a): "
        "Setup failed: setup failed: RuntimeError: the key was refused: setup failed: try another"
    )
    times = {
        "started_at": "2026-11-26T06:46:15.285677868+00:00",
        "completed_at": "2026-11-26T06:46:15.385615034+00:00",
    }

    setup = read_health({"status": "SETUP_FAILED", "setup": {**times, "logs": logs}}).setup

    assert setup is not None
    assert setup.error == "RuntimeError: the key was refused: setup failed: try another"
    assert setup.logs == logs
    assert setup.started_at == datetime(2026, 11, 26, 6, 46, 15, 285677, UTC)


def test_a_failed_setup_without_words_says_so() -> None:
    setup = read_health({"status": "SETUP_FAILED", "setup": {"status": "failed"}}).setup

    assert setup is not None
    assert setup.error == "Cog names no reason"
    assert setup.started_at is None


def test_a_setup_that_succeeded_has_no_error() -> None:
    setup = read_health({"status": "READY", "setup": {"logs": "setup failed: not really"}}).setup

    assert setup is not None
    assert setup.error is None
