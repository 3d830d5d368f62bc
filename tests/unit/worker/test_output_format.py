"""What a job asks of its output's form, as a grammar."""

import json
from typing import Any

import pytest

from engine.grammar_spec import GrammarSpec
from producer.contract import JobRequest
from worker.output_format import grammar_spec

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": False, "schema": SCHEMA},
                }
            },
            GrammarSpec("json_schema", json.dumps(SCHEMA)),
        ),
        ({"regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"regex": "a+", "response_format": {"type": "text"}}, GrammarSpec("regex", "a+")),
        ({"choice": ["yes", "no"]}, GrammarSpec("choice", '["yes", "no"]')),
        ({"grammar": 'start: "a"'}, GrammarSpec("lark", 'start: "a"')),
    ],
)
def test_each_field_becomes_its_kind_of_grammar(fields: dict[str, Any], spec: GrammarSpec | None) -> None:
    request = JobRequest.model_construct(**fields)
    assert grammar_spec(request) == spec
    assert request.output_format_field == (next(iter(fields)) if spec is not None else None)


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    request = JobRequest.model_construct(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    )
    spec = grammar_spec(request)
    assert spec is not None and spec.source.index('"b"') < spec.source.index('"a"')
