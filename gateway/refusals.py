"""Why a request is not served: the status, words for whoever asked, and when to come back."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any, Literal

Reason = Literal[
    "input",
    "unknown",
    "no_key",
    "rate_limit",
    "queue_full",
    "not_serving",
    "draining",
    "bucket",
    "conflict",
    "taken_over",
]
# Where a request's scope has the reason, for whoever counts.
REASON = "refused"


class Refused(Exception):  # noqa: N818 - what it is called everywhere; it is an answer, not a fault
    """Ends a request with an answer: a status, what is wrong, and what to do about it."""

    def __init__(
        self,
        status: HTTPStatus,
        detail: str | list[dict[str, Any]],
        *,
        reason: Reason,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(str(detail))
        self.status = status
        self.detail = detail
        self.reason = reason
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))


def problem(message: str, *place: str, kind: str = "value_error") -> list[dict[str, Any]]:
    """One thing that is wrong with a request, in the form in which Cog tells it."""
    return [{"loc": ["body", *place], "msg": message, "type": kind}]


def wrong_input(detail: str | list[dict[str, Any]]) -> Refused:
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail, reason="input")


def another_input() -> Refused:
    return _taken("this id was used for another input: use a new one for each prediction")


def used_before() -> Refused:
    return _taken("this id was used before: use a new one for each prediction")


def _taken(message: str) -> Refused:
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, problem(message, "id"), reason="conflict")
