"""Write .cog/openapi_schema.json from predict.py, by the rules of `cog build` 0.23.

Cog's server validates requests from that file alone, and nothing that pip installs writes it. Like `cog build`, this
reads predict.py as text and never imports it (`runner_source`), so it runs without torch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # its neighbour, from wherever this is run

from scripts.runner_source import (
    Reader,
    SchemaError,
    is_streaming,
    read_inputs,
    read_output,
    title_case,
)

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_PATH = Path(".cog/openapi_schema.json")


def generate(
    source: str, *, class_name: str = "Runner", filename: str = "predict.py"
) -> dict[str, Any]:
    """The whole OpenAPI document for a runner's source. Raises SchemaError."""
    reader = Reader(source, filename)
    method = reader.method(class_name, "run")
    input_schema, choices = read_inputs(reader, method)
    output = read_output(reader, method)
    return document(input_schema, output, choices, streaming=is_streaming(reader, method))


def document(
    input_schema: Mapping[str, Any],
    output: Mapping[str, Any],
    choices: Mapping[str, Any],
    *,
    streaming: bool,
) -> dict[str, Any]:
    """The parts that are the same for every runner, around the parts that are this one's."""

    def ref(component: str) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{component}"}

    def text(title: str, **more: Any) -> dict[str, Any]:
        return {"title": title, "type": "string", **more}

    def response(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    ok: dict[str, Any] = {"200": response("Successful Response", {})}
    invalid = {"422": response("Validation Error", ref("HTTPValidationError"))}
    request = {"content": {"application/json": {"schema": ref("PredictionRequest")}}}
    prediction_id = {"title": "Prediction Id", "type": "string"}
    parameter = {"name": "prediction_id", "in": "path", "required": True, "schema": prediction_id}
    moments = ("created_at", "started_at", "completed_at")
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog_version()},
        "paths": {
            "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": ok}},
            "/health-check": {
                "get": {
                    "summary": "Healthcheck",
                    "operationId": "healthcheck_health_check_get",
                    "responses": ok,
                }
            },
            "/predictions": {
                "post": {
                    "summary": "Predict",
                    "description": "Run a single prediction on the model",
                    "operationId": "predict_predictions_post",
                    "requestBody": request,
                    "responses": {
                        "200": response("Successful Response", ref("PredictionResponse")),
                        **invalid,
                    },
                    **({"x-cog-streaming": True} if streaming else {}),
                }
            },
            "/predictions/{prediction_id}/cancel": {
                "post": {
                    "summary": "Cancel",
                    "operationId": "cancel_predictions__prediction_id__cancel_post",
                    "parameters": [parameter],
                    "responses": {**ok, **invalid},
                }
            },
        },
        "components": {
            "schemas": {
                "Input": input_schema,
                "Output": output,
                **choices,
                "PredictionRequest": {
                    "title": "PredictionRequest",
                    "type": "object",
                    "properties": {"id": text("Id"), "input": ref("Input")},
                },
                "PredictionResponse": {
                    "title": "PredictionResponse",
                    "type": "object",
                    "properties": {
                        "input": ref("Input"),
                        "output": ref("Output"),
                        "id": text("Id"),
                        "version": text("Version"),
                        **{m: text(title_case(m), format="date-time") for m in moments},
                        "status": text("Status"),
                        "error": text("Error"),
                        "logs": text("Logs"),
                        "metrics": {"title": "Metrics", "type": "object"},
                    },
                },
                "Status": {
                    "title": "Status",
                    "description": "An enumeration.",
                    "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
                    "type": "string",
                },
                "HTTPValidationError": {
                    "title": "HTTPValidationError",
                    "type": "object",
                    "properties": {
                        "detail": {
                            "title": "Detail",
                            "type": "array",
                            "items": ref("ValidationError"),
                        }
                    },
                },
                "ValidationError": {
                    "title": "ValidationError",
                    "type": "object",
                    "required": ["loc", "msg", "type"],
                    "properties": {
                        "loc": {
                            "title": "Location",
                            "type": "array",
                            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        },
                        "msg": text("Message"),
                        "type": text("Error Type"),
                    },
                },
            }
        },
    }


def cog_version() -> str:
    """The Cog this repository is pinned to; `cog build` writes its own version in the same place."""
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^cog==(\S+)$", pins, re.MULTILINE)
    if pinned is None:
        raise SchemaError("requirements.txt: there is no line `cog==<version>`")
    return pinned.group(1)


def same_schema(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents promise callers the same; `info` holds the writer's own version."""
    return {**one, "info": None} == {**other, "info": None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=f"Write {SCHEMA_PATH} from predict.py.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where it is stale"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    runner = options.root / "predict.py"
    target = options.root / SCHEMA_PATH
    try:
        schema = generate(runner.read_text(encoding="utf-8"))
    except (SchemaError, OSError) as error:
        print(f"Cannot make a schema: {error}", file=sys.stderr)
        return 2
    current = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if same_schema(current, schema):
        print(f"{SCHEMA_PATH} is up to date")
    elif options.check:
        print(f"{SCHEMA_PATH} is not what predict.py says; run `make schema`", file=sys.stderr)
        return 1
    else:
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {SCHEMA_PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
