"""Spans that are recorded and sent over OTLP. Imported by tracing.py, and only where traces are configured.

The exporter, the sampler, limits and resource are OpenTelemetry's own and read its own variables.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.logs import bind_trace
from gateway.metrics import METHODS, OTHER, STAGES
from gateway.start_facts import amount, label
from gateway.tracing import Parent, Span, Tracing, Value

SERVICE = "lightning-in-a-bucket"
CLOSE_WITHIN_S = 5.0


class RecordedSpan(Span):
    def __init__(self, span: trace.Span, method: str = "") -> None:
        self._span = span
        self._method = method

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_dotted(attributes))

    def fail(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(StatusCode.ERROR)

    def answered(self, route: str, status: int) -> None:
        self._span.update_name(f"{self._method} {route}".strip())
        self.set(http__route=route, http__response__status_code=status)
        if status >= 500:  # a refusal is the caller's mistake, and not the server's
            self.fail(str(status))

    def generated(self, answer: Mapping[str, Any]) -> None:
        status = answer.get("status")
        output = answer.get("output")
        metrics = answer.get("metrics")
        metrics = metrics if isinstance(metrics, Mapping) else {}
        timings = metrics.get("timings")
        timings = timings if isinstance(timings, Mapping) else {}
        self.set(
            prediction__status=label(status),
            prediction__images=len(output) if isinstance(output, list) else 0,
        )
        if version := label(metrics.get("model_version")):
            self.set(prediction__model_version=version)
        # Stages of several images overlap, and only their sums are known: attributes, for no span would be true.
        for stage in STAGES:
            seconds = amount(timings.get(stage))
            if seconds is not None:
                self._span.set_attribute(f"prediction.stage.{stage}_seconds", seconds)
        if status == "failed":
            self.fail("prediction_failed")


class SpanParent(Parent):
    def __init__(self, span: trace.Span) -> None:
        self.span = span


class RecordedTracing(Tracing):
    def __init__(self, environment: Mapping[str, str]) -> None:
        # An attribute given here would win over OpenTelemetry's own variables.
        named = "OTEL_SERVICE_NAME" in environment or "service.name" in environment.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        resource = Resource.create({} if named else {SERVICE_NAME: SERVICE})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("gateway")
        self._propagator = TraceContextTextMapPropagator()
        # A collector that is away is said once a batch, with nothing that a person could do here.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:
        lowered = {name.lower(): value for name, value in headers.items()}
        method = method if method in METHODS else OTHER
        with (
            self._recorded(
                method,
                SpanKind.SERVER,
                context=self._propagator.extract(lowered),
                attributes={"http.request.method": method},
            ) as span,
            bind_trace(trace.format_trace_id(span.get_span_context().trace_id)),
        ):
            yield RecordedSpan(span, method)

    @contextmanager
    def step(
        self,
        name: str,
        *,
        parent: Parent | None = None,
        outward: bool = False,
        **attributes: Value,
    ) -> Iterator[Span]:
        context = trace.set_span_in_context(parent.span) if isinstance(parent, SpanParent) else None
        with self._recorded(
            name,
            SpanKind.CLIENT if outward else SpanKind.INTERNAL,
            context=context,
            attributes=_dotted(attributes),
        ) as span:
            yield RecordedSpan(span)

    def here(self) -> Parent | None:
        return SpanParent(trace.get_current_span())

    def close(self) -> None:
        # For a collector that is away its exporter tries again for longer than a machine that ends has.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(CLOSE_WITHIN_S)

    @contextmanager
    def _recorded(
        self,
        name: str,
        kind: SpanKind,
        *,
        context: Context | None,
        attributes: Mapping[str, Value],
    ) -> Iterator[trace.Span]:
        """A span that says of an exception only its class: messages may quote what callers sent."""
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=kind,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                RecordedSpan(span).fail(type(error).__name__)
                raise


def _dotted(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {name.replace("__", "."): value for name, value in attributes.items()}
