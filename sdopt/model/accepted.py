"""What a field of a pydantic model takes, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false",
    "array": "a list", "object": "a table",
}  # fmt: skip


def describe_values(schema: Mapping[str, Any]) -> str:
    """ "a whole number from 1 to 1000", of a field's JSON schema. Empty for a type that has no name of its own."""
    schema = next((part for part in schema.get("anyOf", ()) if part.get("type") != "null"), schema)
    kind = _KINDS.get(schema.get("type", ""), "")
    if schema.get("format") == "path":
        return "a path"
    if "exclusiveMinimum" in schema:
        return f"{kind} above {schema['exclusiveMinimum']:g} and up to {schema['maximum']:g}"
    if "minimum" not in schema:
        return kind
    most = schema["maximum"] if "maximum" in schema else schema["exclusiveMaximum"] - 1
    return f"{kind} from {schema['minimum']:g} to {most if isinstance(most, int) else format(most, 'g')}"
