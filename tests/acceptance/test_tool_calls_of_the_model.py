"""Calls that the real model makes, which was not trained to make any: forced, or by the example of earlier ones."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from producer import Client
from producer.contract import Choice, join_deltas
from tests.acceptance.system import system_with_tools

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
    },
    "add": {
        "type": "object",
        "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}},
        "required": ["numbers"],
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name} for the user", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
MESSAGES = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.fixture(scope="module", params=["hermes", "llama"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of a worker whose model is shown tools."""
    if request.param == "hermes":
        with Client(request.getfixturevalue("tool_system").url) as client:
            yield client
        return
    with system_with_tools(tmp_path_factory.mktemp("system"), request.param) as system, Client(system.url) as client:
        yield client


def check(choice: Choice, names: set[str]) -> None:
    assert choice.finish_reason == "tool_calls" and choice.text == "" and choice.tool_calls, choice
    for call in choice.tool_calls:
        assert call["function"]["name"] in names
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def test_a_required_call_has_valid_arguments_in_every_choice(client: Client) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 300}
    result = client.submit(
        **fields, tool_choice="required", parallel_tool_calls=False, n=4, temperature=0.8, seed=5
    ).result(timeout=120)
    for choice in result.choices:
        check(choice, set(SCHEMAS))


def test_a_named_function_is_called_and_streamed(client: Client) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    job = client.submit(messages=MESSAGES, tools=TOOLS, tool_choice=named, max_tokens=300, temperature=0.0)
    deltas = [delta for chunk in job.stream() for delta in chunk.tool_calls or ()]
    (choice,) = job.result(timeout=120).choices
    check(choice, {"add"})
    assert choice.tool_calls is not None and len(choice.tool_calls) == 1
    assert join_deltas(deltas) == choice.tool_calls and len(deltas) > 1


@pytest.mark.parametrize("client", ["hermes"], indirect=True)
def test_an_earlier_call_shows_the_model_how_and_strict_holds_it_to_the_schema(client: Client) -> None:
    """The earlier calls are of a schema that was another one since."""
    schema = {
        **SCHEMAS["get_weather"],
        "properties": {"city": {"enum": ["Rom", "Paris (France)"]}, "unit": {"const": "K"}},
    }
    tool = {"name": "get_weather", "description": "get_weather for the user", "parameters": schema}
    fields: dict[str, Any] = {"messages": earlier_calls(), "max_tokens": 100, "temperature": 0.0}
    free, strict = [
        client.submit(**fields, tools=[{"type": "function", "function": {**tool, "strict": is_strict}}])
        for is_strict in (False, True)
    ]
    (call,) = free.result(timeout=120).choices[0].tool_calls or []
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "unit": "celsius"}
    (choice,) = strict.result(timeout=120).choices
    (call,) = choice.tool_calls or []
    assert choice.finish_reason == "tool_calls" and call["function"]["name"] == "get_weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def earlier_calls() -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for city in ("Rome", "Oslo", "Lima"):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city, "unit": "celsius"})}
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "x", "content": "20 degrees"},
            {"role": "assistant", "content": f"It is 20 degrees in {city}."},
        ]
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]
