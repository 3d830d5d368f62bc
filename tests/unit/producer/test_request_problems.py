"""What a request that breaks the contract is told: the field, the rule, what was given."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from producer import InvalidJobError
from producer.contract import JobRequest, summarize
from producer.enqueue import build_request


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "give exactly one of prompt and messages; neither was given"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt", "both were given"),
        ({"prompt": ""}, "prompt", "prompt is empty; give at least one character or token id"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": 5}, "prompt", "prompt: must be text or a list of token ids; got 5"),
        ({"prompt": [1, "a"]}, "prompt[1]", "prompt[1]: must be a whole number; got 'a'"),
        ({"prompt": [-1]}, "prompt[0]", "prompt[0]: must be at least 0; got -1"),
        ({"prompt": "\ud800"}, "prompt", "prompt: character 0 is a lone surrogate; give valid Unicode"),
        ({"messages": []}, "messages", "messages is empty; give at least one message"),
        ({"messages": "hi"}, "messages", "messages: must be a list; got 'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "messages[0]: must be an object; got 'hi'"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "'assistant' or 'tool'; got 'boss'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role: is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a message of role 'user' needs content"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "messages[0].content: must be text or a list of text parts; got 5",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
            "must be 'text'; got 'image'",
        ),
        ({"messages": [{"role": "user", "content": "x", "nmae": 1}]}, "messages[0].nmae", "did you mean name?"),
        (
            {"messages": [{"role": "tool", "content": "4"}]},
            "messages[0].tool_call_id",
            "a message of role 'tool' needs the id of the call that it answers",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "belongs to messages of role 'tool'; this one is of role 'user'",
        ),
        (
            {"messages": [{"role": "system", "content": "x", "reasoning": "so"}]},
            "messages[0].reasoning",
            "only the assistant has reasoning; this message is of role 'system'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}]},
            "messages[0].tool_calls",
            "messages[0].tool_calls: must have at least 1 items; got []",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "messages[0].tool_calls[0].function.name",
            "messages[0].tool_calls[0].function.name: is required",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object as text, such as '{\"city\": \"Rome\"}'; got '{'",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": set()}}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "give plain JSON values in valid Unicode",
        ),
        ({"prompt": "a", "temprature": 1}, "temprature", "temprature: unknown field; did you mean temperature?"),
        ({"prompt": "a", "zzzz": 1}, "zzzz", "zzzz: unknown field; leave it out"),
        ({"prompt": "a", "temperature": 3}, "temperature", "temperature: must be at most 2; got 3"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature: must be at least 0; got -1"),
        ({"prompt": "a", "temperature": "1"}, "temperature", "temperature: must be a number; got '1'"),
        ({"prompt": "a", "temperature": True}, "temperature", "temperature: must be a number; got True"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", "must be a finite number"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "must be at least 1, or 0 with echo to score the prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens: must be at least 0; got -1"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "must be a whole number; got 1.5"),
        ({"prompt": "a", "top_k": 0}, "top_k", "top_k must be at least 1, or -1 for off"),
        ({"prompt": "a", "stop": 5}, "stop", "stop: must be text or a list of texts; got 5"),
        ({"prompt": "a", "stop": ["a", "b" * 1025]}, "stop[1]", "stop[1]: must have at most 1024 characters; got 'bbb"),
        ({"prompt": "a", "stop": [""]}, "stop[0]", "stop[0]: must not be empty"),
        ({"prompt": "a", "regex": "a", "choice": ["a"]}, "choice", "give at most one of response_format, regex"),
        ({"prompt": "a", "regex": ""}, "regex", "regex is empty; give one or leave it out"),
        ({"prompt": "a", "choice": []}, "choice", "choice is empty; give one or leave it out"),
        ({"prompt": "a", "choice": ["a", ""]}, "choice", "choice holds an empty text"),
        ({"prompt": "a", "choice": "a"}, "choice", "choice: must be a list; got 'a'"),
        ({"prompt": "a", "grammar": "x" * 300_000}, "grammar", "grammar has 300,002 bytes as JSON; at most 262,144"),
        (
            {"prompt": "a", "response_format": {"type": "json"}},
            "response_format.type",
            "must be 'text' or 'json_object' or 'json_schema'; got 'json'",
        ),
        (
            {"prompt": "a", "response_format": {"type": "text", "json_schema": {}}},
            "response_format",
            "response_format of type 'text' has no field 'json_schema'",
        ),
        (
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "must be an object with name and schema; got None",
        ),
        (
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": "s"}}},
            "response_format.json_schema.schema",
            "must be a JSON Schema, an object; got 's'",
        ),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens", "min_tokens: must be at least 0; got -1"),
        (
            {"prompt": "a", "min_tokens": 4, "max_tokens": 3},
            "min_tokens",
            "min_tokens: must be at most max_tokens (3); got 4",
        ),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty", "presence_penalty: must be at most 2; got 2.5"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "frequency_penalty: must be at least -2"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty: must be at least 0.01"),
        ({"prompt": "a", "repetition_penalty": "1"}, "repetition_penalty", "must be a number; got '1'"),
        ({"prompt": "a", "logit_bias": [5]}, "logit_bias", "logit_bias: must be an object; got [5]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "logit_bias: keys are token ids; got 'x'"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias", "logit_bias: keys are token ids; got '-1'"),
        ({"prompt": "a", "logit_bias": {"1" * 11: 1}}, "logit_bias", "logit_bias: keys are token ids; got '1111"),
        (
            {"prompt": "a", "chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs",
            "give messages instead of a prompt",
        ),
        (
            {
                "prompt": "a",
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": "yes"}},
            },
            "response_format.json_schema.strict",
            "response_format.json_schema.strict must be true or false; got 'yes'",
        ),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "logit_bias: must be at most 100; got 101"),
        ({"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias", "logit_bias: must be a number; got '1'"),
        (
            {"prompt": "a", "logit_bias": dict.fromkeys(range(1025), 1)},
            "logit_bias",
            "logit_bias: must have at most 1024 items",
        ),
        ({"prompt": "a", "logprobs": 3}, "logprobs", "logprobs: must be true or false; got 3"),
        ({"prompt": "a", "top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs: set logprobs to true"),
        ({"prompt": "a", "logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20; got 21"),
        ({"prompt": "a", "echo": "yes"}, "echo", "echo: must be true or false; got 'yes'"),
        (
            {"prompt": "a", "min_tokens": 2, "regex": "a+"},
            "min_tokens",
            "min_tokens cannot be combined with regex, which says where the output may end",
        ),
        ({"prompt": "a", "metadata": {"x": math.nan}}, "metadata", "metadata: cannot be written as JSON"),
        ({"prompt": "a", "metadata": {"x": {1}}}, "metadata", "metadata: cannot be written as JSON"),
        ({"prompt": "a", "metadata": {"x": "\ud800"}}, "metadata", "metadata: cannot be written as JSON"),
        ({"prompt": "a", "metadata": _nested(65)}, "metadata", "metadata: is nested deeper than 64 levels"),
        ({"prompt": "a", "response_format": {"x": _nested(900)}}, "response_format", "is nested deeper than 64 levels"),
        ({"prompt": "a", "response_format": {"x": object()}}, "response_format", "give plain JSON values"),
        ({"prompt": "a", "task": "rank"}, "task", "task: must be 'generate' or 'embed'; got 'rank'"),
        (
            {"prompt": "a", "task": "embed", "max_tokens": 3},
            "max_tokens",
            "max_tokens: has no meaning with task 'embed'",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "task": "embed"}, "messages", "give a prompt or inputs"),
        ({"prompt": "a", "inputs": ["a"], "task": "embed"}, "inputs", "exactly one of prompt and inputs"),
        ({"task": "embed"}, "inputs", "exactly one of prompt and inputs with task 'embed'; neither given"),
        ({"task": "embed", "inputs": []}, "inputs", "inputs is empty"),
        ({"task": "embed", "inputs": ["a", []]}, "inputs[1]", "inputs[1] is empty"),
        ({"task": "embed", "inputs": ["a", 5]}, "inputs[1]", "inputs[1]: must be text or a list of token ids; got 5"),
        ({"task": "embed", "inputs": ["a"] * 2049}, "inputs", "inputs: must have at most 2048 items"),
        ({"task": "embed", "prompt": ""}, "prompt", "prompt is empty"),
        ({"task": "embed", "prompt": "a", "dimensions": 0}, "dimensions", "dimensions: must be at least 1; got 0"),
        ({"prompt": "a", "dimensions": 5}, "dimensions", "dimensions: is for jobs of task 'embed'"),
        ({"inputs": ["a"]}, "inputs", "inputs: is for jobs of task 'embed'"),
        ({"prompt": "a", "v": 2}, "v", "v: must be 1; got 2"),
        ({"prompt": "a", "priority": 2**53 + 1}, "priority", "priority: must be at most 9007199254740992; got 9007199"),
        ({"prompt": "a", "deadline": 1e308}, "deadline", "deadline: must be below 1e+18; got 1e+308"),
        ({"prompt": "a", "model": "m" * 1025}, "model", "model: must have at most 1024 characters; got 'mmm"),
        ({"prompt": "a", "n": 0, "top_p": 0}, "n", "n: must be at least 1; got 0; top_p: must be above 0; got 0"),
        ("a prompt", None, "a request must be a mapping of fields"),
    ],
)
def test_a_broken_rule_is_said_with_its_field_and_remedy(fields: Any, param: str | None, message: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        build_request(fields)
    assert message in str(error.value)
    assert error.value.param == param


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(InvalidJobError) as error:
        build_request({"prompt": "a", "metadata": "x" * 10_000})
    assert len(str(error.value)) < 120


MANY = 20_000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", **{f"field_{number}": 1 for number in range(MANY)}}, "field_0"),
        ({"prompt": "a", "x" * MANY: 1}, "x" * 59 + "…"),
        ({"messages": [1] * MANY}, "messages[0]"),
        ({"messages": [{}] * MANY}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [1] * MANY}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a", **{f"a{i}": 1 for i in range(MANY)}}]}, "messages[0].a0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [1] * MANY}, "tools[0]"),
        ({"prompt": [None] * MANY}, "prompt[0]"),
        ({"task": "embed", "inputs": [[-1] * MANY]}, "inputs[0][0]"),
        ({"prompt": "a", "stop": [1] * MANY}, "stop[0]"),
        ({"prompt": "a", "stop_token_ids": [-1] * MANY}, "stop_token_ids[0]"),
        ({"prompt": "a", "choice": [1] * MANY}, "choice[0]"),
        ({"prompt": "a", "logit_bias": {f"a{number}": 1 for number in range(MANY)}}, "logit_bias"),
    ],
)
def test_a_request_with_thousands_of_faults_is_told_of_a_few(fields: dict[str, Any], param: str) -> None:
    """Each fault is an error of pydantic's, of a kilobyte: 4 MB of them took half a minute and 3.5 GB."""
    with pytest.raises(ValidationError) as error:
        JobRequest.model_validate(fields)
    assert error.value.error_count() <= 10
    problem = summarize(error.value)
    assert problem.param == param and len(problem.message) < 1000


def test_of_many_problems_the_first_are_told_and_the_others_counted() -> None:
    wrong = dict.fromkeys(("n", "top_p", "min_p", "top_k", "seed", "temperature", "priority", "deadline", "echo"), "x")
    with pytest.raises(InvalidJobError, match=r"^prompt: must .*; and 2 more$"):
        build_request({"prompt": 5, **wrong, "stream": 1, "logprobs": 1})


@pytest.mark.parametrize("field", ["metadata", "chat_template_kwargs"])
def test_what_is_the_callers_own_is_limited(field: str) -> None:
    request = {"messages": [{"role": "user", "content": "a"}], field: {"note": "x" * 60_000}}
    build_request(request)
    with pytest.raises(InvalidJobError, match=f"^{field}: must take at most 65536 bytes as JSON; got 70012: give less"):
        build_request({**request, field: {"note": "x" * 70_000}})


def test_whole_numbers_do_where_a_number_is_asked_for() -> None:
    assert build_request({"prompt": "a", "temperature": 1, "stop": "END"}).stop == ["END"]
