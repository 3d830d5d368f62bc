"""What a job may ask of its output's form: `response_format`, `regex`, `choice` or `grammar`, one of them.

Owns what can be known without a tokenizer; whether a grammar compiles is found out by the worker's engine.
"""

import json
from collections.abc import Mapping
from typing import Any

MAX_GRAMMAR_BYTES = 256 * 1024  # of a schema, expression, grammar or list of choices, as JSON
OUTPUT_FORMAT_FIELDS = ("response_format", "regex", "choice", "grammar")

_TYPES = ("text", "json_object", "json_schema")
_JSON_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


def find_format_problem(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The field at fault and its rule. `values`: the job's `OUTPUT_FORMAT_FIELDS`, None where not given."""
    given = [name for name in OUTPUT_FORMAT_FIELDS if values[name] is not None]
    if values["response_format"] == {"type": "text"}:
        given.remove("response_format")
    if len(given) > 1:
        return given[1], f"give at most one of {', '.join(OUTPUT_FORMAT_FIELDS)}; {' and '.join(given)} were given"
    for name in given:
        if not values[name]:
            return name, f"{name} is empty; give one or leave it out"
    if values["choice"] is not None and not all(values["choice"]):
        return "choice", "choice holds an empty text; every choice needs at least one character"
    if given and (size := len(json.dumps(values[given[0]]).encode())) > MAX_GRAMMAR_BYTES:
        return given[0], f"{given[0]} has {size:,} bytes as JSON; at most {MAX_GRAMMAR_BYTES:,} are taken"
    return _response_format_problem(values["response_format"])


def _response_format_problem(value: dict[str, Any] | None) -> tuple[str, str] | None:
    if value is None:
        return None
    if value.get("type") not in _TYPES:
        known = " or ".join(f"'{name}'" for name in _TYPES)
        return "response_format.type", f"response_format.type must be {known}; got {value.get('type')!r:.60}"
    wants_schema = value["type"] == "json_schema"
    unknown = sorted(map(str, value.keys() - {"type", *(["json_schema"] if wants_schema else [])}))
    if unknown:
        return "response_format", f"response_format of type {value['type']!r} has no field {unknown[0]!r}"
    return _json_schema_problem(value.get("json_schema")) if wants_schema else None


def _json_schema_problem(value: Any) -> tuple[str, str] | None:
    where = "response_format.json_schema"
    if not isinstance(value, dict):
        return where, f"{where} must be an object with name and schema; got {value!r:.60}"
    if unknown := sorted(map(str, value.keys() - _JSON_SCHEMA_FIELDS)):
        return where, f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(_JSON_SCHEMA_FIELDS))}"
    if not isinstance(value.get("schema"), dict):
        return f"{where}.schema", f"{where}.schema must be a JSON Schema, an object; got {value.get('schema')!r:.60}"
    if not isinstance(value.get("strict"), bool | None):
        return f"{where}.strict", f"{where}.strict must be true or false; got {value['strict']!r:.60}"
    return None
