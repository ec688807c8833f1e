"""What is read at the moment of a scrape: the queue, Cog's state, how it started, what it serves, the cards."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway.cog_status import State, Status
from gateway.gpu import Card, Cards
from gateway.start_facts import StartFacts, label

MOST_VERSIONS = 16
"""Of models served one after the other or in turns; the one served longest ago is forgotten."""


class Observed(Protocol):
    """What a scrape asks of the gateway's desk."""

    @property
    def status(self) -> Status: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def queue_size(self) -> int: ...


class Gauges(Collector):
    """Nothing is kept here but what was told last; every scrape asks anew."""

    def __init__(self, desk: Observed, cards: Cards) -> None:
        self._desk = desk
        self._cards = cards
        self._served: OrderedDict[str, float] = OrderedDict()
        self.start = StartFacts()

    def served(self, version: str) -> None:
        """Note that a model's version just made an image."""
        if not version:
            return
        self._served[version] = time.time()
        self._served.move_to_end(version)
        if len(self._served) > MOST_VERSIONS:
            self._served.popitem(last=False)

    def describe(self) -> Iterable[Metric]:
        """Nothing: without this, registering would scrape, and ask the cards, before the first request."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from _queue(self._desk)
        yield from _state(self._desk.status)
        yield from _start(self.start)
        yield _labelled(
            "gateway_model_version_last_served_timestamp_seconds",
            "When an image was last made with a version of a model.",
            "version",
            self._served,
        )
        yield from _gpu(self._cards.read())

    def close(self) -> None:
        self._cards.close()


def _queue(desk: Observed) -> Iterator[Metric]:
    yield _gauge("gateway_predictions_waiting", "Predictions in the gateway's queue.", desk.waiting)
    yield _gauge("gateway_predictions_running", "Predictions that Cog has.", desk.running)
    yield _gauge("gateway_queue_size", "How many predictions may wait.", desk.queue_size)
    yield _gauge("gateway_slots", "How many predictions may run at once.", desk.slots)


def _state(status: Status) -> Iterator[Metric]:
    states = {state.value: float(state is status.state) for state in State}
    yield _labelled("gateway_state", "1 for the state that Cog's server is in.", "state", states)
    yield _gauge(
        "gateway_state_since_timestamp_seconds",
        "When Cog's server came into its state.",
        status.since.timestamp(),
    )
    yield CounterMetricFamily(
        "gateway_cog_restarts", "How often Cog's server was started again.", value=status.restarts
    )


def _start(start: StartFacts) -> Iterator[Metric]:
    model = InfoMetricFamily("gateway_model", "The model and version of the last cold start.")
    if start.version:
        model.add_metric((), {"model": start.model, "version": start.version})
    yield model
    yield _gauge(
        "gateway_cold_start_timestamp_seconds", "When the last cold start began.", start.started_at
    )
    yield _gauge(
        "gateway_cold_start_ready_seconds",
        "From the start of Cog's runner until it served.",
        start.ready_after_s,
    )
    yield _labelled(
        "gateway_cold_start_phase_seconds",
        "How long each phase of the last cold start took; phases overlap.",
        "phase",
        start.phases,
    )
    yield _labelled(
        "gateway_cold_start_waited_seconds",
        "The part of each phase that the cold start waited for; together about the whole.",
        "phase",
        start.waited,
    )
    yield _gauge(
        "gateway_weights_bytes", "Bytes of weights read at the start.", start.weights_bytes
    )
    yield _gauge(
        "gateway_weights_read_seconds", "How long reading them took.", start.weights_seconds
    )
    yield _gauge(
        "gateway_weights_read_bytes_per_second",
        "Bytes of weights by the seconds that reading them took.",
        start.bytes_per_second,
    )
    yield _labelled(
        "gateway_weights_source_bytes",
        "Where these bytes came from; those read again count again.",
        "source",
        start.bytes_from,
    )
    yield _labelled(
        "gateway_weights_read_events",
        "How often something happened while weights were read.",
        "event",
        start.reads,
    )
    yield _gauge(
        "gateway_weights_connections",
        "How many connections read weights at once, at most.",
        start.connections,
    )


def _gpu(cards: tuple[Card, ...]) -> Iterator[Metric]:
    info = InfoMetricFamily("gateway_gpu", "The NVIDIA cards of this machine.", labels=["gpu"])
    for card in cards:
        info.add_metric([str(card.index)], {"name": label(card.name), "uuid": label(card.uuid)})
    yield info
    yield _labelled(
        "gateway_gpu_memory_used_bytes",
        "Memory of a card in use, by whichever process.",
        "gpu",
        {str(card.index): card.memory_used for card in cards},
    )
    yield _labelled(
        "gateway_gpu_memory_total_bytes",
        "Memory that a card has.",
        "gpu",
        {str(card.index): card.memory_total for card in cards},
    )
    yield _labelled(
        "gateway_gpu_utilization_ratio",
        "Part of the last moments in which a card computed anything, 0 to 1.",
        "gpu",
        {str(card.index): card.utilization for card in cards},
    )


def _gauge(name: str, help: str, value: float | None) -> Metric:
    """Without a value, the metric is there and has no sample."""
    family = GaugeMetricFamily(name, help)
    if value is not None:
        family.add_metric((), value)
    return family


def _labelled(
    name: str, help: str, label_name: str, values: Mapping[str, float | None] | Mapping[str, float]
) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[label_name])
    for value, number in values.items():
        if number is not None:
            family.add_metric([value], number)
    return family
