"""What the gateway counts, for Prometheus: requests, predictions and their stages, refusals, webhooks.

What is merely read when somebody scrapes (the queue, Cog's state, the cold start, the cards) is in gauges.py.
Labels come from short lists, never from what a caller sent: no ids, no prompts, no paths. Used on the event loop alone.
"""

from collections.abc import Mapping
from http import HTTPMethod
from typing import Any, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from gateway.gauges import Gauges, Observed
from gateway.gpu import Cards
from gateway.refusals import Reason
from gateway.start_facts import amount, label, read_start
from gateway.webhooks import WebhookEvent

REASONS: tuple[str, ...] = get_args(Reason)
EVENTS: tuple[str, ...] = get_args(WebhookEvent)
STATUSES = ("succeeded", "failed", "canceled")
SOURCES = ("cog", "replicate", "predict", "page")
STAGES = ("wait", "prompt", "denoise", "decode", "encode", "upload")
METHODS = frozenset(HTTPMethod)
OTHER = "other"
MOST_ROUTES = 64

# Close together where an image is made; below that for pages and prompts, above for queues and slow cards.
SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)


class Metrics:
    """Everything there is to scrape, in a registry of its own. No method raises for what callers or Cog sent."""

    def __init__(self, desk: Observed, *, cards: Cards | None = None) -> None:
        """`desk` is asked at every scrape; `cards` are this machine's unless given."""
        # When each series began is in no panel and doubles their number.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._routes: set[str] = set()
        self._gauges = Gauges(desk, cards or Cards())
        self._registry.register(self._gauges)
        ProcessCollector(registry=self._registry)

        self._requests = self._counter(
            "gateway_http_requests", "HTTP requests answered.", ("method", "route", "status")
        )
        self._request_seconds = self._histogram(
            "gateway_http_request_duration_seconds",
            "From an HTTP request's first byte to its answer's last; event streams last as long as their prediction.",
            ("method", "route"),
        )
        self._predictions = self._counter(
            "gateway_predictions",
            "Predictions that came to an end on this gateway.",
            ("source", "status"),
        )
        self._wait_seconds = self._histogram(
            "gateway_prediction_wait_seconds", "How long predictions waited in the gateway's queue."
        )
        self._run_seconds = self._histogram(
            "gateway_prediction_run_seconds", "How long Cog had predictions.", ("status",)
        )
        self._stage_seconds = self._histogram(
            "gateway_prediction_stage_seconds",
            "Seconds of each stage of a prediction, summed over its images, which overlap.",
            ("stage",),
        )
        self._images = self._counter("gateway_images", "Images made and stored.")
        self._replays = self._counter(
            "gateway_predictions_replayed", "Recorded results returned again, without the GPU."
        )
        self._refusals = self._counter(
            "gateway_refusals", "Requests that were refused, by why.", ("reason",)
        )
        self._webhooks = self._counter(
            "gateway_webhooks", "Webhooks, tries of one counted once.", ("event", "outcome")
        )
        self._begin_at_zero()

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request. `route` is the template it matched; "" for none."""
        method = method if method in METHODS else OTHER
        route = self._known_route(route)
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(amount(seconds) or 0.0)

    def prediction(
        self, answer: Mapping[str, Any], *, source: str, waited_s: float, ran_s: float
    ) -> None:
        """One prediction at its end, with the answer its caller gets."""
        status = _one_of(STATUSES, answer.get("status"))
        self._predictions.labels(_one_of(SOURCES, source), status).inc()
        self._wait_seconds.observe(amount(waited_s) or 0.0)
        self._run_seconds.labels(status).observe(amount(ran_s) or 0.0)
        output = answer.get("output")
        if status == "succeeded" and output:
            self._images.inc(len(output) if isinstance(output, list) else 1)
        metrics = _mapping(answer.get("metrics"))
        timings = _mapping(metrics.get("timings"))
        for stage in STAGES:
            seconds = amount(timings.get(stage))
            if seconds is not None:
                self._stage_seconds.labels(stage).observe(seconds)
        self._gauges.served(label(metrics.get("model_version")))

    def refused(self, reason: Reason) -> None:
        self._refusals.labels(_one_of(REASONS, reason)).inc()

    def replayed(self) -> None:
        self._replays.inc()

    def webhook(self, event: WebhookEvent, delivered: bool) -> None:
        outcome = "delivered" if delivered else "failed"
        self._webhooks.labels(_one_of(EVENTS, event), outcome).inc()

    def cold_start(self, document: object) -> None:
        """What is in Cog's cold-start.json now; None: there is none, or none any more."""
        self._gauges.start = read_start(document)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics for who accepts it, else Prometheus's text."""
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # a version that is none
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

    def close(self) -> None:
        self._gauges.close()

    def _begin_at_zero(self) -> None:
        """Show what has not happened yet as 0: `increase()` does not see a series that begins with 1."""
        for source in SOURCES:
            for status in STATUSES:
                self._predictions.labels(source, status)
        for status in STATUSES:
            self._run_seconds.labels(status)
        for stage in STAGES:
            self._stage_seconds.labels(stage)
        for reason in REASONS:
            self._refusals.labels(reason)
        for event in EVENTS:
            for outcome in ("delivered", "failed"):
                self._webhooks.labels(event, outcome)

    def _known_route(self, route: str) -> str:
        """The route, unless there are too many: a path that was taken for a template must not fill the memory."""
        if len(self._routes) < MOST_ROUTES:
            self._routes.add(label(route))
        return label(route) if label(route) in self._routes else OTHER

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, help, labels, registry=self._registry, buckets=SECONDS)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _one_of(known: tuple[str, ...], value: object) -> str:
    return value if isinstance(value, str) and value in known else OTHER
