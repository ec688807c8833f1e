"""What the gateway's parts say about a request's way through them, for OpenTelemetry where it is configured.

Where it is not, a `Tracing` does nothing and none of OpenTelemetry's SDK is imported; where it is, spans.py does the
work. Spans never hold a prompt, an input, a key or a URL.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)

Value = str | bool | int | float


class Span:
    """One part of the way, while it lasts. This one is nowhere recorded."""

    def set(self, **attributes: Value) -> None:
        """Note what is known by now. A double underscore becomes a dot: `http__route`."""

    def fail(self, kind: str) -> None:
        """It went wrong; `kind` is a word from a short list, or an exception's class."""

    def answered(self, route: str, status: int) -> None:
        """The request's answer; `route` is the template that it matched."""

    def generated(self, answer: Mapping[str, Any]) -> None:
        """The prediction's end: its status, its model's version, how many images, and the seconds of each stage."""


class Parent:
    """A span to be the parent of others in another task; made by `Tracing.here`."""


class Tracing:
    """Where spans begin. What is begun inside a `with` of another, also in a task started there, is its child."""

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:  # noqa: ARG002
        """A caller's request; a W3C `traceparent` among its headers makes it part of their trace."""
        yield Span()

    @contextmanager
    def step(
        self,
        name: str,  # noqa: ARG002
        *,
        parent: Parent | None = None,  # noqa: ARG002
        outward: bool = False,  # noqa: ARG002
        **attributes: Value,  # noqa: ARG002
    ) -> Iterator[Span]:
        """A part of it, such as "claim", "queue", "generation", "record" or "webhook".

        `outward` is for asking another server. Without a `parent`, it is a child of what is under way here.
        """
        yield Span()

    def here(self) -> Parent | None:
        """What is under way in this task, for a `step` in one that was not started in it."""
        return None

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks: call it on a thread."""


def configure(environment: Mapping[str, str] | None = None) -> Tracing:
    """What OpenTelemetry's own variables ask for; a `Tracing` that does nothing where they ask for nothing.

    What they ask for and is not there is a warning: nothing here may keep the gateway from serving.
    """
    given = os.environ if environment is None else environment
    endpoint = given.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or given.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    exporter = given.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if given.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return Tracing()
    if not endpoint and not exporter:
        return Tracing()
    protocol = given.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or given.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if exporter not in ("", "otlp"):
        _log.warning(
            "no traces: OTEL_TRACES_EXPORTER names an exporter that is not installed. Set it to otlp, or to none"
        )
        return Tracing()
    if protocol != "http/protobuf":
        _log.warning(
            "no traces: the OTLP protocol asked for is not installed. Set OTEL_EXPORTER_OTLP_PROTOCOL to "
            "http/protobuf, and OTEL_EXPORTER_OTLP_ENDPOINT to the collector's port for it, mostly 4318"
        )
        return Tracing()
    from gateway.spans import RecordedTracing

    return RecordedTracing(given)
