"""The document at /openapi.json is valid and complete, and nothing that it says can be asked breaks the server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from demo.s3 import EmbeddedS3
from gateway.keys import digest_of, new_key
from tests.support.gateway_server import GatewayServer

KEY = new_key()
OPEN = {"/live", "/ready", "/health-check", "/status"}
# Sealed by its URL, or with a key: OpenAPI has no word for the first.
SEALED = {"/v1/predictions/{prediction_id}/stream"}
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,ignored_auth,missing_required_header"
)


@pytest.fixture(scope="module")
def gateway(s3: EmbeddedS3, runner_folder: Path) -> Iterator[GatewayServer]:
    s3.create_bucket("openapi-images")
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": "openapi-images",
        "API_KEYS": f"tester:{digest_of(KEY)}",
        "STORE_IMAGES": "1",
        "LONGEST_SECONDS": "0",
    }
    with GatewayServer(environment, runner_folder) as running:
        yield running


@pytest.fixture(scope="module")
def document(gateway: GatewayServer) -> dict[str, Any]:
    told: dict[str, Any] = gateway.get("/openapi.json").json()
    return told


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_the_document_has_every_route_of_the_gateway_and_none_of_cogs_that_lead_nowhere(
    document: dict[str, Any],
) -> None:
    paths = {(method, path) for path, method, _ in operations(document)}

    assert {
        ("put", "/predictions/{prediction_id}"),
        ("get", "/predictions/{prediction_id}"),
        ("post", "/predictions/{prediction_id}/cancel"),
        ("get", "/predictions"),
        ("post", "/predictions"),
        ("post", "/v1/predictions"),
        ("post", "/v1/models/{owner}/{name}/predictions"),
        ("post", "/predict"),
        ("get", "/metrics"),
    } <= paths
    assert "/shutdown" not in document["paths"]


def test_the_document_says_which_routes_need_a_key(document: dict[str, Any]) -> None:
    needing = {path for path, _, operation in operations(document) if operation.get("security")}

    assert document["paths"].keys() - needing == OPEN | SEALED
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize(
    ("path", "method", "schema"),
    [
        ("/predictions", "post", "PredictionRequest"),
        ("/predictions/{prediction_id}", "put", "PredictionRequest"),
        ("/v1/predictions", "post", "ReplicatePredictionRequest"),
        ("/predict", "post", "Input"),
    ],
)
def test_the_document_says_what_is_to_be_sent(
    document: dict[str, Any], path: str, method: str, schema: str
) -> None:
    body = document["paths"][path][method]["requestBody"]["content"]["application/json"]

    assert body["schema"] == {"$ref": f"#/components/schemas/{schema}"}


def test_inputs_are_told_as_they_are_checked(
    document: dict[str, Any], gateway: GatewayServer
) -> None:
    seed = document["components"]["schemas"]["Input"]["properties"]["seed"]

    assert (seed["type"], seed["minimum"]) == ("integer", 0)
    assert "nullable" not in seed
    answer = gateway.post(
        "/predictions",
        json={"input": {"prompt": "a fox", "seed": None}},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.status_code == 422


@pytest.mark.slow
def test_nothing_that_the_document_allows_or_forbids_breaks_the_server(
    gateway: GatewayServer, tmp_path: Path
) -> None:
    """About a thousand requests, good and bad, and each answer as the document says."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json"]
    told = subprocess.run(
        [
            *command,
            *("--header", f"Authorization: Bearer {KEY}"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "20"),
            *("--checks", CHECKS, "--generation-deterministic"),
            *("--request-timeout", "60", "--no-shrink", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.returncode == 0, told.stdout[-8000:] + told.stderr[-2000:]
    assert gateway.get("/ready").status_code == 200
    assert "Traceback" not in gateway.logs
