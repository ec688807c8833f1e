"""What the gateway's bodies look like, as OpenAPI components. What a model takes and gives is in Cog's own document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT: Schema = {"type": "string"}
_MOMENT: Schema = {"type": "string", "format": "date-time"}
_ANY: Schema = {}
_OBJECT: Schema = {"type": "object"}
_EVENTS = _list({"type": "string", "enum": ["start", "output", "logs", "completed"]})
_STATUS: Schema = {
    "type": "string",
    "enum": ["starting", "processing", "succeeded", "failed", "canceled"],
}
_MAYBE_TEXT, _MAYBE_MOMENT = _or_null(_TEXT), _or_null(_MOMENT)


def _page(name: str) -> Schema:
    return _object({"previous": _MAYBE_TEXT, "next": _MAYBE_TEXT, "results": _list(ref(name))})


def _problem(**more: Schema) -> Schema:
    return _object({"title": _TEXT, "detail": _TEXT, "status": {"type": "integer"}}, **more)


# An explicit null is no value of a model's inputs, but it is one of these.
_WEBHOOK = {
    "webhook": _MAYBE_TEXT,
    "webhook_events_filter": _or_null(_EVENTS),
}

SCHEMAS: dict[str, Schema] = {
    "PredictionRequest": _object(
        {"input": ref("Input")},
        id=_or_null({"type": "string", "minLength": 1, "maxLength": 512}),
        context=_or_null(_OBJECT),
        **_WEBHOOK,
    ),
    "Predictions": _object(
        {"predictions": _list(ref("PredictionResponse")), "before": _MAYBE_TEXT}
    ),
    "Error": _object({"detail": {"anyOf": [_TEXT, _list(ref("WrongField"))]}}),
    "WrongField": _object(
        {"loc": _list({"type": ["string", "integer"]}), "msg": _TEXT, "type": _TEXT}
    ),
    "SimpleAnswer": _object(
        {
            "id": _TEXT,
            "image": {"type": "string", "description": "the first image, base64"},
            "images": _list(_TEXT),
            "content_type": _TEXT,
        },
        seed={"type": "integer"},
        model_version=_TEXT,
        timings=_OBJECT,
    ),
    "ReplicatePredictionRequest": _object(
        {"input": ref("Input")},
        version=_MAYBE_TEXT,
        model=_MAYBE_TEXT,
        webhook_completed=_MAYBE_TEXT,
        **_WEBHOOK,
    ),
    "ReplicatePrediction": _object(
        {
            "id": _TEXT,
            "model": _TEXT,
            "version": _TEXT,
            "input": _OBJECT,
            "output": _ANY,
            "error": _MAYBE_TEXT,
            "logs": _TEXT,
            "metrics": _OBJECT,
            "status": _STATUS,
            "created_at": _MOMENT,
            "started_at": _MAYBE_MOMENT,
            "completed_at": _MAYBE_MOMENT,
            "data_removed": {"type": "boolean"},
            "source": _TEXT,
            "urls": _object({"get": _TEXT, "cancel": _TEXT, "stream": _TEXT}),
        }
    ),
    "ReplicatePredictions": _page("ReplicatePrediction"),
    "ReplicateVersion": _object(
        {"id": _TEXT, "created_at": _MOMENT, "cog_version": _TEXT, "openapi_schema": _OBJECT}
    ),
    "ReplicateVersions": _page("ReplicateVersion"),
    "ReplicateModel": _object(
        {
            "url": _TEXT,
            "owner": _TEXT,
            "name": _TEXT,
            "visibility": _TEXT,
            "run_count": {"type": "integer"},
            "latest_version": _or_null(ref("ReplicateVersion")),
        }
    ),
    "ReplicateAccount": _object({"type": _TEXT, "username": _TEXT, "name": _TEXT}),
    "ReplicateProblem": _problem(
        invalid_fields=_list(_object({"type": _TEXT, "field": _TEXT, "description": _TEXT}))
    ),
}


def requested(name: str) -> Schema:
    """An operation's body: JSON of that schema."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(name)}},
        }
    }


def answered(status: int, name: str, *, also: str | None = None) -> dict[int | str, Any]:
    """An operation's answer: JSON of that schema, or what `also` is the media type of."""
    content: Schema = {"application/json": {"schema": ref(name)}}
    if also is not None:
        content[also] = {}
    return {int(status): {"description": "Successful Response", "content": content}}


def text_answer(*media_types: str) -> dict[int | str, Any]:
    return {
        200: {
            "description": "Successful Response",
            "content": {name: {} for name in media_types},
        }
    }
