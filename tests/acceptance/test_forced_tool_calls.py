"""Calls forced by grammar from the real model, which was not trained to make any, through a real worker."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from producer import Client
from producer.contract import Choice, join_deltas
from tests.acceptance.system import System
from tests.fakes.chat_templates import HERMES, LLAMA
from worker.embedded_redis import EmbeddedRedis

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
    """Of a worker whose model is shown tools by a template of the operator's."""
    folder: Path = tmp_path_factory.mktemp("system")
    template = folder / "template.jinja"
    template.write_text({"hermes": HERMES, "llama": LLAMA}[request.param])
    with EmbeddedRedis() as server, Client(server.url) as client:
        system = System(server.url, folder)
        try:
            system.start_worker("--chat-template", str(template), "--tool-parser", request.param)
            yield client
        finally:
            system.stop()


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
