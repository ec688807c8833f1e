"""deploy/monitoring/ with a real Prometheus, which scrapes a gateway's metrics: panels and alerts find theirs there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI, Request, Response
from prometheus_client.parser import text_string_to_metric_families

from gateway.cog_status import State, Status
from gateway.keys import digest_of, new_key, parse_keys
from gateway.metrics import EVENTS, REASONS, SOURCES, STAGES, STATUSES, Metrics
from gateway.start_facts import READS
from gateway.start_facts import SOURCES as WEIGHTS_SOURCES
from tests.gateway.scraped import (
    SINCE,
    VERSION,
    Desk,
    answer,
    new_metrics,
    play,
)
from tests.support.asgi import serving
from tests.support.prometheus import Prometheus, prometheus
from tests.support.promql import metric_names

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy/monitoring"
PAGE = (ROOT / "docs/monitoring.md").read_text("utf-8")
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
# What Prometheus itself adds to every target.
OF_PROMETHEUS = {"up"}

needs_prometheus = pytest.mark.system_program("prometheus", "promtool")


def panel_expressions() -> list[tuple[str, str]]:
    """Title and expression of everything on the dashboard that asks Prometheus, annotations included."""
    panels = [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]
    marks = [(mark["name"], mark["expr"]) for mark in DASHBOARD["annotations"]["list"]]
    return panels + marks


def filled_in(expression: str) -> str:
    """As Grafana asks it, with all jobs and gateways chosen."""
    for variable, value in (("$__rate_interval", "1m"), ("$job", ".*"), ("$instance", ".*")):
        expression = expression.replace(variable, value)
    assert "$" not in expression, "a variable of the dashboard that the tests do not know"
    return expression


def exposed(metrics: Metrics) -> dict[str, Any]:
    """Families by the name that the page gives them, as Prometheus's text format does."""
    body = metrics.exposition("")[0].decode()
    found = {}
    for family in text_string_to_metric_families(body):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = family
    return found


def sample_names(metrics: Metrics) -> set[str]:
    return {sample.name for family in exposed(metrics).values() for sample in family.samples}


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = new_metrics()
    play(metrics)
    yield metrics
    metrics.close()


def app_for(metrics: Metrics, key: str) -> FastAPI:
    app = FastAPI()
    keys = parse_keys(f"prometheus:{digest_of(key)}")

    @app.get("/metrics")
    async def scrape(request: Request) -> Response:
        if keys.find(request.headers.get("authorization")) is None:
            return Response(status_code=401)
        body, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    return app


@dataclass(frozen=True)
class Scraped:
    """A Prometheus with the configuration of deploy/monitoring, and the gateway's metrics that it scrapes."""

    server: Prometheus
    metrics: Metrics
    desk: Desk


@contextmanager
def scraped(folder: Path, *, right_key: bool = True) -> Iterator[Scraped]:
    desk = Desk(waiting=3, running=2)
    metrics = new_metrics(desk)
    key = new_key()
    configuration = folder / "prometheus.yml"
    shutil.copy(MONITORING / "alerts.yml", folder)
    (folder / "gateway.key").write_text(key if right_key else new_key())
    with serving(app_for(metrics, key)) as port:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
        configuration.write_text(yaml.safe_dump(config))
        with prometheus(configuration, folder) as server:
            yield Scraped(server, metrics, desk)
    metrics.close()


@needs_prometheus
def test_a_prometheus_with_our_configuration_scrapes_what_happened(tmp_path: Path) -> None:
    with scraped(tmp_path) as gateway:
        server = gateway.server
        server.until(lambda: server.value('up{job="gateway"}') == 1)
        assert server.value("gateway_predictions_waiting") == 3
        assert server.value('gateway_predictions_total{source="cog",status="succeeded"}') == 0

        play(gateway.metrics)
        gateway.desk.status = Status(State.DEAD, SINCE, restarts=1)

        server.until(lambda: server.value("gateway_cog_restarts_total") == 1)
        labels = 'route="/predictions/{prediction_id}",status="200"'
        assert server.value(f"gateway_http_requests_total{{{labels}}}") == 1
        assert server.value('gateway_predictions_total{source="cog",status="succeeded"}') == 1
        assert server.value('gateway_state{state="dead"}') == 1
        assert server.value("gateway_weights_read_bytes_per_second") == 1e9
        assert server.value('gateway_gpu_memory_used_bytes{gpu="0"}') == 30 * 2**30
        [(model, _)] = server.query("gateway_model_info")
        assert model["version"] == VERSION
        half = "histogram_quantile(0.5, gateway_prediction_wait_seconds_bucket)"
        assert server.value(half) is not None


@needs_prometheus
def test_every_panel_shows_something_once_everything_has_happened(tmp_path: Path) -> None:
    with scraped(tmp_path) as gateway:
        server = gateway.server
        server.until(lambda: server.value("gateway_images_total") == 0)
        play(gateway.metrics)
        gateway.desk.status = Status(State.READY, SINCE, restarts=1)
        # A rate needs two points, and a route that was new needs one more request.
        server.until(lambda: server.value("gateway_images_total") == 2)
        play(gateway.metrics)
        server.until(lambda: server.value("gateway_images_total") == 4)

        empty = [
            f"{title}: {expression}"
            for title, expression in panel_expressions()
            if not server.query(filled_in(expression))
        ]
        rules = server.api("rules")["groups"][0]["rules"]

    assert empty == []
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}  # unknown: not evaluated yet


@needs_prometheus
def test_with_a_key_that_is_not_known_the_gateway_is_down_for_prometheus(tmp_path: Path) -> None:
    with scraped(tmp_path, right_key=False) as gateway:
        server = gateway.server
        server.until(lambda: server.value('up{job="gateway"}') == 0)
        (target,) = server.api("targets")["activeTargets"]

    assert "401" in target["lastError"]


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_configuration_and_rules(tmp_path: Path) -> None:
    for file in ("prometheus.yml", "alerts.yml"):
        shutil.copy(MONITORING / file, tmp_path)
    (tmp_path / "gateway.key").touch()

    checked = subprocess.run(
        ["promtool", "check", "config", "--lint-fatal", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in checked.stdout


@needs_prometheus
def test_every_alert_fires_when_it_should_and_not_else() -> None:
    tested = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        check=False,
    )

    assert tested.returncode == 0, tested.stdout + tested.stderr
    cases = yaml.safe_load((MONITORING / "alerts_test.yml").read_text("utf-8"))["tests"]
    fires, silent = set(), set()
    for case in cases:
        for test in case["alert_rule_test"]:
            (fires if test["exp_alerts"] else silent).add(test["alertname"])
    assert fires == silent == {rule["alert"] for rule in RULES}


@needs_prometheus
def test_promtool_finds_the_exposition_in_order(metrics: Metrics) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=metrics.exposition("")[0],
        capture_output=True,
        check=False,
    )

    assert (checked.returncode, checked.stderr) == (0, b"")


def test_every_metric_that_a_panel_names_exists(metrics: Metrics) -> None:
    expressions = [(title, filled_in(text)) for title, text in panel_expressions()]
    known = sample_names(metrics)

    missing = [(title, metric_names(text) - known) for title, text in expressions]

    assert len(expressions) > 40
    assert [found for found in missing if found[1]] == []


def test_every_metric_that_an_alert_names_exists(metrics: Metrics) -> None:
    known = sample_names(metrics) | OF_PROMETHEUS

    assert [rule["alert"] for rule in RULES if not metric_names(rule["expr"]) <= known] == []
    assert all(metric_names(rule["expr"]) for rule in RULES)


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert(metrics: Metrics) -> None:
    used = {name for _, text in panel_expressions() for name in metric_names(filled_in(text))}
    used |= {name for rule in RULES for name in metric_names(rule["expr"])}

    unused = [
        name
        for name, family in exposed(metrics).items()
        if name.startswith("gateway_") and not used & {sample.name for sample in family.samples}
    ]

    assert unused == []


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up == 0", {"up"}),
        ('sum by (le, route) (rate(a_bucket{le="x",y=~"b_total|c"}[5m]))', {"a_bucket"}),
        ("a / on (x) group_left (model) b_info", {"a", "b_info"}),
        ("histogram_quantile(0.95, sum(rate(a_bucket[1m])) without (z)) > 30", {"a_bucket"}),
        ("a offset 5m and b unless ignoring(c) d", {"a", "b", "d"}),
        ('{__name__="a",b="c"} > bool 1e3', {"a"}),
        ("count(max_over_time(a:b[1h:5m])) # and c", {"a:b"}),
        ("topk(3, a) or vector(0)", {"a"}),
    ],
)
def test_names_of_metrics_are_told_from_the_rest_of_an_expression(
    expression: str, names: set[str]
) -> None:
    assert metric_names(expression) == names


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    panels = DASHBOARD["panels"]
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}

    assert variables == {"source", "job", "instance"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    places = [
        (panel["gridPos"]["y"] + down, panel["gridPos"]["x"] + right)
        for panel in panels
        for down in range(panel["gridPos"]["h"])
        for right in range(panel["gridPos"]["w"])
    ]
    assert len(places) == len(set(places)), "two panels lie over each other"


def test_every_metric_has_its_row_on_the_page_and_no_other_has(metrics: Metrics) -> None:
    rows = re.findall(r"^\| `(gateway_\w+)` \| (\w+) \| ([^|]*) \|", PAGE, re.MULTILINE)
    kinds = {"info": "gauge"}  # to Prometheus's text format an info metric is a gauge
    told = {
        name: (kinds.get(kind, kind), set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in rows
    }
    has = {
        name: (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for name, family in exposed(metrics).items()
        if name.startswith("gateway_")
    }

    assert len(rows) == len(told)
    assert told == has


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ("`source` of a prediction", SOURCES),
        ("`status` of a prediction", STATUSES),
        ("`stage`", STAGES),
        ("`reason`", REASONS),
        ("`state`", [state.value for state in State]),
        ("`event` of a webhook", EVENTS),
        ("`event` while reading", READS),
        ("`source` of weights", WEIGHTS_SOURCES),
    ],
)
def test_every_value_of_a_label_is_on_the_page(row: str, values: Sequence[str]) -> None:
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", PAGE, re.MULTILINE)

    assert re.findall(r"`(\w+)`", cell.partition(";")[0]) == list(values)


def test_no_label_takes_what_callers_send(metrics: Metrics) -> None:
    metrics.prediction(
        answer(id="some-id", input={"prompt": "a fox", "model": "m"}),
        source="cog",
        waited_s=0,
        ran_s=0,
    )

    labels = {
        label
        for family in exposed(metrics).values()
        for sample in family.samples
        for label in sample.labels
    }

    assert not labels & {"id", "prediction_id", "prompt", "path", "input", "key", "url"}
