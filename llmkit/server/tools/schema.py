"""The grammar of calls that must be made: a JSON schema of the arguments, or of a list of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.server.http.errors import refuse

Tool = dict[str, Any]
_DEFINITIONS = ("$defs", "definitions")
# beside these, `properties` does not say all that an object may have
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if")


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What a tool's arguments look like; a tool without `parameters` takes none.

    Objects that list their properties have no others, unless the schema says so: a function would not take them.
    """
    return closed(tool["function"].get("parameters") or {"type": "object", "properties": {}})


def calls_schema(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    """One or more calls: [{"name": ..., "parameters": {...}}, ...]."""
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": [_call_schema(t) for t in tools]}}
    return schema | ({} if parallel else {"maxItems": 1}) | _lifted_definitions(tools)


def closed(schema: Any) -> Any:
    """`schema` with `additionalProperties: false` where it lists properties and leaves the question open."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, Mapping):
        return schema
    inner = {k: v if k in ("allOf", "const", "enum", "default", "examples") else closed(v) for k, v in schema.items()}
    lists = isinstance(schema.get("properties"), Mapping) and not any(k in schema for k in _OPEN)
    return inner | ({"additionalProperties": False} if lists else {})


def _call_schema(tool: Tool) -> dict[str, Any]:
    parameters = {k: v for k, v in arguments_schema(tool).items() if k not in _DEFINITIONS}
    properties = {"name": {"const": tool["function"]["name"]}, "parameters": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False}


def _lifted_definitions(tools: Sequence[Tool]) -> dict[str, Any]:
    """Definitions of the tools' schemas at the top, where their "#/$defs/..." points to once they are part of a larger schema."""
    lifted: dict[str, Any] = {}
    for tool in tools:
        schema = arguments_schema(tool)
        for key in _DEFINITIONS:
            own = schema.get(key)
            for name, meaning in own.items() if isinstance(own, Mapping) else ():
                if lifted.setdefault(key, {}).setdefault(name, meaning) != meaning:
                    raise refuse(f"two tools define {name!r} differently", "tools", f"rename it in one tool's {key}")
    return lifted
