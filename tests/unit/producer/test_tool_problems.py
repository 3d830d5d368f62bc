"""What a request with wrong tools is told: the field, the rule, what was given."""

from typing import Any

import pytest

from producer import InvalidJobError
from producer.contract import JobRequest
from producer.enqueue import build_request

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def tool(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


NAMED_G = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": 5}, "tools", "tools: must be a list; got 5"),
        ({"tools": []}, "tools", "tools: is empty; give at least one, or leave it out"),
        ({"tools": [5]}, "tools[0]", "tools[0]: must be an object; got 5"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "tools[0].type: must be 'function'; got 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "tools[0].function: is required"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "must match ^[a-zA-Z0-9_-]{1,64}$; got 'a b'"),
        ({"tools": [tool(), tool("g"), tool()]}, "tools", "tools: names must be unique; 'f' is that of tools 0 and 2"),
        ({"tools": [tool(paramters={})]}, "tools[0].function.paramters", "unknown field; did you mean parameters?"),
        ({"tools": [tool(parameters=5)]}, "tools[0].function.parameters", "must be an object; got 5"),
        (
            {"tools": [tool(), tool("g", parameters={"type": "string"})]},
            "tools[1].function.parameters",
            "must be the JSON schema of an object; its type is 'string'",
        ),
        (
            {"tools": [tool(parameters={"type": "object", "properties": []})]},
            "tools[0].function.parameters",
            "properties must be an object",
        ),
        ({"tools": [tool(parameters={"x": "\ud800"})]}, "tools", "tools: cannot be written as JSON"),
        ({"tools": [tool(parameters={"x": object()})]}, "tools", "give plain JSON values in valid Unicode"),
        ({"tools": [tool(description="x" * 300_000)]}, "tools", "tools: must take at most 262144 bytes as JSON"),
        ({"tools": [tool(f"f{at}") for at in range(129)]}, "tools", "tools: must have at most 128 items"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "must be true or false; got 'yes'"),
        ({"tools": [tool()], "messages": None, "prompt": "x"}, "tools", "give messages instead of a prompt"),
        (
            {"tools": [tool()], "regex": "a+"},
            "tools",
            "tools and regex exclude each other; give one of them, or a schema",
        ),
        ({"tools": [tool()], "regex": "a+", "tool_choice": "required"}, "tools", "tools and regex exclude each other"),
        ({"tool_choice": "auto"}, "tool_choice", "tool_choice needs tools to choose from"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto' or 'required'; got 'any'"),
        ({"tools": [tool()], "tool_choice": NAMED_G}, "tool_choice", "'g', which is not among the tools (f)"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tools": [tool()], "tool_choice": "required", "min_tokens": 5},
            "min_tokens",
            "min_tokens cannot be combined with a tool_choice that forces a call",
        ),
        ({"tools": [tool(strict=True)], "min_tokens": 5}, "min_tokens", "cannot be combined with strict tools"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false; got 'no'"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs: must be an object; got []"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "must not set tools; leave it out"),
        ({"chat_template_kwargs": {"a": object()}}, "chat_template_kwargs", "cannot be written as JSON"),
    ],
)
def test_a_broken_rule_is_said_with_its_field_and_remedy(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        build_request({**CHAT, **fields})
    assert message in str(error.value)
    assert error.value.param == param


def test_tools_travel_as_they_were_given() -> None:
    """The order of keys is that of the prompt."""
    given = [{"function": {"parameters": {"type": "object", "properties": {}}, "name": "f"}, "type": "function"}]
    request = build_request({**CHAT, "tools": given, "tool_choice": {"type": "function", "function": {"name": "f"}}})
    wire = request.model_dump_json(exclude_defaults=True)
    assert JobRequest.model_validate_json(wire) == request
    assert list(request.tools[0]) == ["function", "type"] and request.tools == given  # type: ignore[index]


@pytest.mark.parametrize("choice", [None, "none", "auto", "required"])
def test_what_openais_clients_send_is_taken(choice: str | None) -> None:
    fields = {"tools": [tool(description=None, strict=True, parameters={})], "tool_choice": choice}
    request = build_request({**CHAT, **fields, "parallel_tool_calls": True})
    assert (request.callable_tools is None) is (choice == "none")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [tool()], "response_format": {"type": "text"}},
        {"tools": [tool()], "tool_choice": "none", "regex": "a+"},
        {"response_format": {"type": "text"}, "regex": "a+"},
    ],
)
def test_what_describes_no_form_excludes_none(fields: dict[str, Any]) -> None:
    request = build_request({**CHAT, **fields})
    assert request.output_format_field == ("regex" if "regex" in fields else None)
