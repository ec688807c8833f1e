"""A real Prometheus, with the configuration that is deployed, scrapes the real gateway."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gateway.keys import digest_of, new_key
from tests.support.gateway_server import GatewayServer
from tests.support.prometheus import prometheus

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "prometheus.yml"


def configured_for(gateway: GatewayServer, key: str, folder: Path) -> Path:
    """The deployed configuration with this gateway as its target, often enough for a test."""
    configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    (folder / "key").write_text(key)
    configuration["global"]["scrape_interval"] = "500ms"
    configuration["global"]["scrape_timeout"] = "500ms"
    configuration.pop("rule_files", None)
    (job,) = configuration["scrape_configs"]
    job.pop("scrape_interval", None)
    job.pop("scrape_timeout", None)
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [gateway.url.removeprefix("http://")]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


@pytest.mark.system_program("prometheus")
def test_what_the_gateway_does_arrives_at_prometheus(
    gateway_environment: dict[str, str], runner_folder: Path, tmp_path: Path
) -> None:
    key = new_key()
    environment = {**gateway_environment, "API_KEYS": f"alice:{digest_of(key)}"}
    authorized = {"Authorization": f"Bearer {key}"}
    with GatewayServer(environment, runner_folder) as gateway:
        for _ in range(2):
            gateway.put("counted", {"prompt": "counted", "num_outputs": 2}, headers=authorized)
        gateway.put("failed", {"prompt": "fail"}, headers=authorized)
        assert gateway.put("stranger", {"prompt": "x"}).status_code == 401
        refused = [
            gateway.put("counted", {"prompt": "another"}, headers=authorized),
            gateway.put("no-prompt", {}, headers=authorized),
            gateway.get("/predictions/nobody-knows", headers=authorized),
            gateway.get("/v1/predictions/nobody-knows", headers=authorized),
            gateway.get("/predictions?limit=none", headers=authorized),
        ]
        assert [answer.status_code for answer in refused] == [422, 422, 404, 404, 422]

        with prometheus(configured_for(gateway, key, tmp_path), tmp_path) as server:
            server.until(lambda: server.value('gateway_state{state="ready"}') == 1)
            expected = {
                'gateway_predictions_total{source="cog",status="succeeded"}': 1,
                'gateway_predictions_total{source="cog",status="failed"}': 1,
                "gateway_predictions_replayed_total": 1,
                "gateway_images_total": 2,
                'gateway_refusals_total{reason="no_key"}': 1,
                'gateway_refusals_total{reason="conflict"}': 1,
                'gateway_refusals_total{reason="input"}': 2,
                'gateway_refusals_total{reason="unknown"}': 2,
                'gateway_http_requests_total{method="PUT",route="/predictions/{prediction_id}",status="200"}': 3,
                'gateway_prediction_stage_seconds_count{stage="denoise"}': 1,
            }
            assert {name: server.value(name) for name in expected} == expected
