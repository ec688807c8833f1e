"""What an answer of Cog's `/health-check` means for whoever runs Cog. Decides only; asks and ends nothing.

The answer is HTTP 200 whatever the state; the state is in the body (Cog 0.23).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any

# What Cog wraps around the runner's own error, once per layer that the error came through.
_WRAPPING = re.compile(r"^(?:(?:worker )?setup failed(?: \(slot [0-9a-f-]+\))?: )*", re.IGNORECASE)


class Condition(Enum):
    """What Cog's server can do now, as far as it says so."""

    STARTING = auto()
    READY = auto()
    BUSY = auto()
    SETUP_FAILED = auto()
    WORKER_SLOW = auto()
    """The worker did not answer Cog in time: it may be deep in one long computation, or hang."""
    WORKER_DEAD = auto()
    """Cog does not start another one."""


@dataclass(frozen=True)
class Setup:
    """How the setup went, as Cog reports it; times that it does not tell are None."""

    started_at: datetime | None
    completed_at: datetime | None
    logs: str
    error: str | None
    """What the runner said when its setup failed, without what Cog wraps around it."""


@dataclass(frozen=True)
class Health:
    condition: Condition
    setup: Setup | None
    explanation: str
    """Cog's own words about the worker's health; empty while all is well."""


def read_health(body: Any) -> Health:
    """The meaning of a health check's JSON.

    Raises:
        ValueError: it is not what Cog answers.
    """
    match body:
        case {"status": str(status)}:
            explanation = str(body.get("user_healthcheck_error") or "")
            condition = _condition(status, explanation)
        case _:
            raise ValueError("the answer names no status")
    setup = body.get("setup")
    failed = condition is Condition.SETUP_FAILED
    told = _read_setup(setup, failed=failed) if isinstance(setup, Mapping) else None
    return Health(condition, told, explanation)


def _condition(status: str, explanation: str) -> Condition:
    match status:
        case "STARTING" | "UNKNOWN":
            return Condition.STARTING
        case "READY" | "BUSY" | "SETUP_FAILED":
            return Condition[status]
        case "UNHEALTHY" if "timed out" in explanation:
            return Condition.WORKER_SLOW
        case "UNHEALTHY" | "DEFUNCT":
            return Condition.WORKER_DEAD
        case _:
            raise ValueError(
                f"the answer names a status that Cog 0.23 does not have: {status[:40]!r}"
            )


def _read_setup(setup: Mapping[str, Any], *, failed: bool) -> Setup:
    logs = str(setup.get("logs") or "")
    return Setup(
        _time(setup.get("started_at")),
        _time(setup.get("completed_at")),
        logs,
        (_WRAPPING.sub("", logs).strip() or "Cog names no reason") if failed else None,
    )


def _time(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if isinstance(text, str) else None
