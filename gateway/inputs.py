"""Inputs against the schema that Cog's server serves, before anything is spent on them.

With the library that Cog's server itself validates with, so both say the same in the same words; asked here first,
since an id must not be claimed for an input that will be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from gateway.refusals import problem, wrong_input


class Inputs:
    """The inputs that one model takes.

    Args:
        document: Cog's OpenAPI document. One that holds no input schema lets everything pass, as Cog's server does.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        components = document.get("components")
        schemas = components.get("schemas") if isinstance(components, Mapping) else None
        schema = schemas.get("Input") if isinstance(schemas, Mapping) else None
        self._properties: dict[str, Any] | None = None
        self._required: list[str] = []
        self._validator: jsonschema_rs.Validator | None = None
        if isinstance(schema, Mapping):
            properties = schema.get("properties")
            self._properties = dict(properties) if isinstance(properties, Mapping) else None
            self._required = list(schema.get("required") or [])
            # Its references lead into the document's own components.
            whole = {**schema, "components": components}
            self._validator = jsonschema_rs.validator_for(whole)

    def check(self, given: dict[str, Any]) -> dict[str, Any]:
        """The input without what the model does not have, which Cog drops too. Raises Refused (422)."""
        known = (
            given
            if self._properties is None
            else {name: value for name, value in given.items() if name in self._properties}
        )
        missing = [name for name in self._required if name not in known]
        if missing:
            raise wrong_input(
                [
                    told
                    for name in missing
                    for told in problem("Field required", "input", name, kind="value_error.missing")
                ]
            )
        if self._validator is not None:
            try:
                wrong = [
                    told
                    for error in self._validator.iter_errors(known)
                    for told in problem(error.message, "input", *map(str, error.instance_path))
                ]
            except (
                ValueError,
                RecursionError,
            ):  # JSON can spell both, and the library reads neither
                wrong = problem("holds half a character, or is nested too deeply", "input")
            if wrong:
                raise wrong_input(wrong)
        return known
