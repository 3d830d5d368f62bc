"""Bodies of the Responses API to jobs: by way of the chat's, with errors in the words of the body."""

import re
from typing import Any

import pytest

from producer.contract import ErrorCode, ErrorInfo, JobRequest
from producer.errors import InvalidJobError
from producer.openai.request import CHAT_URL, in_callers_words, parse_body, request_from_body
from producer.openai.responses.request import CALLERS_NAMES, RESPONSES_URL, AskedResponse

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "name": "look", "description": "d", "parameters": SCHEMA, "strict": True}
CHAT_TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": SCHEMA, "strict": True}}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def job_of(**fields: Any) -> JobRequest:
    return parse_body(RESPONSES_URL, {"model": "m", "input": "hi", **fields}).jobs[0]


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({}, {}),
        (
            {"instructions": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
        ),
        ({"instructions": ""}, {}),
        (
            {"max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9},
            {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9},
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [CHAT_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}},
            {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        ),
        (
            {
                "tools": [TOOL, {**TOOL, "name": "b"}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "look"}],
                },
            },
            {"tools": [CHAT_TOOL], "tool_choice": "auto"},
        ),
        ({"tools": [], "tool_choice": "auto"}, {}),
        (
            {"tools": [{**TOOL, "strict": None}]},
            {"tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": SCHEMA}}]},
        ),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        (
            {"text": {"format": {"type": "json_object"}, "verbosity": None}},
            {"response_format": {"type": "json_object"}},
        ),
        (
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "n",
                        "schema": SCHEMA,
                        "strict": True,
                        "description": None,
                    }
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0, "reasoning": {"effort": None}}, {}),
        (
            {"metadata": {"a": "b"}, "seed": 3, "top_k": 5, "regex": "a+", "priority": 2, "tenant": "t"},
            {"metadata": {"a": "b"}, "seed": 3, "top_k": 5, "regex": "a+", "priority": 2, "tenant": "t"},
        ),
        (
            {
                "user": "u",
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "service_tier": "auto",
                "truncation": "disabled",
                "max_tool_calls": 3,
                "conversation": None,
                "client_metadata": {"turn_id": "t"},
                "reasoning": {"summary": "auto"},
            },
            {},
        ),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
    ],
)
def test_a_response_is_the_job_that_the_chat_which_asks_the_same_is(
    fields: dict[str, Any], chat: dict[str, Any]
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **chat}
    assert job_of(**fields) == parse_body(CHAT_URL, body).jobs[0]


def test_what_is_no_affair_of_the_job_is_kept_beside_it() -> None:
    asked = parse_body(
        RESPONSES_URL, {"input": "a", "instructions": "b", "background": True, "previous_response_id": "r"}
    )
    assert asked.response == AskedResponse(background=True, has_instructions=True, previous_response_id="r")
    assert asked.is_in_background and not asked.is_streamed
    asked = parse_body(RESPONSES_URL, {"input": "a", "store": False})
    assert asked.response == AskedResponse(store=False)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": None}, "input", "is required"),
        ({"messages": []}, "messages", "use input"),
        ({"response_format": {"type": "text"}}, "response_format", "use text.format"),
        ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"n": 2}, "n", "a response is one answer"),
        ({"logprobs": True}, "logprobs", "message.output_text.logprobs"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions and input"),
        ({"truncation": "auto"}, "truncation", "is refused"),
        ({"background": 1}, "background", "must be true or false"),
        ({"background": True, "store": False}, "background", "leave out store: false"),
        ({"instructions": ["x"]}, "instructions", "must be text"),
        ({"max_output_tokens": -1}, "max_output_tokens", "max_output_tokens: must be at least 0; got -1"),
        ({"temperature": 9}, "temperature", "must be at most 2"),
        ({"top_logprobs": 3}, "top_logprobs", "needs include"),
        ({"include": ["x"]}, "include", "'x' is not supported"),
        ({"include": "x"}, "include", "must be a list"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "chat_template_kwargs"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "leave it out"),
        ({"reasoning": {"x": 1}}, "reasoning.x", "unknown field"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "text.verbosity: is OpenAI's"),
        ({"text": "x"}, "text", "must be an object"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "must be 'text' or 'json_object' or 'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "must be a JSON Schema"),
        ({"text": {"format": {}}}, "text.format.type", "got None"),
        ({"tools": "x"}, "tools", "must be a list"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be 'function': OpenAI's own tools are not served"),
        ({"tools": [CHAT_TOOL]}, "tools[0].name", "tools[0].name: is required"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name", "must match"),
        ({"tools": [{**TOOL, "parameters": {"type": "array"}}]}, "tools[0].parameters", "schema of an object"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "must be 'function'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "not among the tools (look)",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "tool_choice",
            "must have a mode",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"metadata": {"a": 5}}, "metadata", "'a' has 5"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "only with stream: true"),
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        (
            {"input": [{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}]},
            "input[1].content",
            "input[1].content: character 0",
        ),
        ({"instructions": "\ud800"}, "instructions", "instructions: character 0"),
        (
            {"instructions": "i", "input": [{"role": "user", "content": "a"}, CALL, {**CALL, "arguments": "["}]},
            "input[2].arguments",
            "must be a JSON object as text",
        ),
        (
            {"input": [CALL, {"type": "function_call_output", "call_id": "c1", "output": "\ud800"}]},
            "input[1].output",
            "lone surrogate",
        ),
        (
            {"input": [CALL, {"type": "function_call_output", "call_id": "\ud800", "output": "x"}]},
            "input[1].call_id",
            "lone surrogate",
        ),
        ({"input": [CALL, {**CALL, "call_id": "\ud800"}]}, "input[1].call_id", "lone surrogate"),
    ],
)
def test_what_is_not_served_or_wrong_is_refused_in_the_words_of_the_body(
    fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidJobError) as refused:
        job_of(**fields)
    assert (refused.value.param, says in str(refused.value)) == (param, True), str(refused.value)


def test_a_fault_among_many_items_is_told_without_a_search_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    substitute = re.sub

    def record(pattern: str, replacement: Any, text: str) -> str:
        searched.append(pattern)
        return substitute(pattern, replacement, text)

    monkeypatch.setattr(re, "sub", record)
    items = [{"role": "user", "content": "a"}, CALL, {"type": "function_call_output", "call_id": "c1", "output": "b"}]
    with pytest.raises(InvalidJobError, match=r"^input\[3000\]\.content: "):
        job_of(input=[*items * 1000, {"role": "user", "content": "\ud800"}])
    assert 0 < len(searched) < 100


def test_what_a_worker_finds_is_told_in_the_words_of_the_body() -> None:
    message = "messages: the template refuses response_format.json_schema.schema and tools[1].function.name"
    error = in_callers_words(ErrorInfo(code=ErrorCode.UNSUPPORTED, message=message, param="messages"), CALLERS_NAMES)
    assert error.message == "input: the template refuses text.format.schema and tools[1].name"
    assert error.param == "input"


def test_a_batchs_line_stands_alone() -> None:
    assert request_from_body(RESPONSES_URL, {"input": "a", "stream": True}).stream is True
    with pytest.raises(InvalidJobError, match="stand alone"):
        request_from_body(RESPONSES_URL, {"input": "a", "previous_response_id": "r"})
