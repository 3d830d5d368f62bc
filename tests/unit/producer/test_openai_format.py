"""OpenAI's shapes to ours and back."""

import json
from typing import Any

import pytest

from producer import Choice, ErrorInfo, InvalidJobError, JobRequest, Message, Result, Usage
from producer.batch.lines import BadLineError, BatchLine, answer_line, bad_line, parse_line
from producer.contract import ErrorCode, PromptEcho, TokenLogprob, TopLogprob
from producer.openai.request import CHAT_URL, COMPLETIONS_URL, request_from_body
from producer.openai.response import response_body

MESSAGES = [{"role": "user", "content": "Hello"}]


def line(**fields: Any) -> bytes:
    whole = {"custom_id": "r1", "method": "POST", "url": CHAT_URL, "body": {"messages": MESSAGES}, **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def test_a_line_is_its_id_its_url_and_its_body() -> None:
    assert parse_line(line()) == BatchLine("r1", CHAT_URL, {"messages": MESSAGES})


@pytest.mark.parametrize(
    ("raw", "code", "custom_id"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        ("{}".encode("utf-16"), "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (line(custom_id=...), "missing_custom_id", None),
        (line(custom_id=5), "missing_custom_id", None),
        (line(custom_id=""), "missing_custom_id", None),
        (line(method="GET"), "invalid_method", "r1"),
        (line(url="/v1/images"), "invalid_url", "r1"),
        (line(body="x"), "invalid_body", "r1"),
    ],
)
def test_a_line_that_is_no_request_says_why(raw: bytes, code: str, custom_id: str | None) -> None:
    with pytest.raises(BadLineError) as error:
        parse_line(raw)
    assert (error.value.code, error.value.custom_id) == (code, custom_id)
    assert bad_line(error.value, number=3)["error"]["line"] == 3


@pytest.mark.parametrize(
    ("url", "body", "param", "message"),
    [
        (CHAT_URL, {"messages": MESSAGES, "max_completion_tokens": -1}, "max_completion_tokens", "must be at least 0"),
        (CHAT_URL, {"messages": MESSAGES, "max_tokens": -1}, "max_tokens", "must be at least 0; got -1"),
        (COMPLETIONS_URL, {"prompt": "a", "logprobs": 21}, "logprobs", "must be at most 20; got 21"),
    ],
)
def test_an_error_is_about_the_field_as_the_caller_wrote_it(
    url: str, body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidJobError) as error:
        request_from_body(url, body)
    assert error.value.param == param and str(error.value).startswith(f"{param}: {message}")


def test_a_chat_body_becomes_a_job() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "assistant", "content": "a", "refusal": None, "name": None}, *MESSAGES],
        "max_completion_tokens": 5,
        "temperature": None,
        "stop": "END",
        "user": "u",
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 3,
    }
    assert request_from_body(CHAT_URL, body) == JobRequest(
        model="m",
        messages=[Message(role="assistant", content="a"), Message(role="user", content="Hello")],
        max_tokens=5,
        stop=["END"],
        top_k=3,
    )


def test_a_choice_among_some_of_the_tools_leaves_the_others_out() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "look", "ping")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools[1:]}}
    job = request_from_body(CHAT_URL, {"messages": MESSAGES, "tools": tools, "tool_choice": choice})
    assert (job.tools, job.tool_choice) == (tools[1:], "required")


@pytest.mark.parametrize(
    ("allowed", "param", "rule"),
    [
        ({"mode": "none", "tools": [{"function": {"name": "add"}}]}, "tool_choice.allowed_tools", "must have a mode"),
        ({"mode": "auto", "tools": ["add"]}, "tool_choice.allowed_tools", "must have a mode"),
        ({"mode": "auto", "tools": [{"function": {"name": []}}]}, "tool_choice.allowed_tools", "must have a mode"),
        (None, "tool_choice.allowed_tools", "must have a mode"),
        (
            {"mode": "auto", "tools": [{"function": {"name": "x"}}]},
            "tool_choice.allowed_tools",
            "'x', which is not among",
        ),
        ({"mode": "auto", "tools": []}, "tools", "is empty"),
    ],
)
def test_a_choice_among_tools_that_cannot_be_is_refused(allowed: Any, param: str, rule: str) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(InvalidJobError, match=rule) as error:
        request_from_body(CHAT_URL, {"messages": MESSAGES, "tools": tools, "tool_choice": choice})
    assert error.value.param == param


@pytest.mark.parametrize("tool", ["add", {"function": {"name": ["add"]}}, {"type": "function", "function": {}}])
def test_what_is_no_tool_is_told_of_beside_a_choice_among_some(tool: Any) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]}
    tools = [*allowed["tools"], tool]
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    with pytest.raises(InvalidJobError) as error:
        request_from_body(CHAT_URL, {"messages": MESSAGES, "tools": tools, "tool_choice": choice})
    assert str(error.value.param).startswith("tools[1]")


def test_a_line_of_a_batch_is_known_by_its_custom_id() -> None:
    with pytest.raises(InvalidJobError, match=r"^idempotency_key: .* custom_id; leave it out") as error:
        request_from_body(CHAT_URL, {"messages": MESSAGES, "idempotency_key": "k"})
    assert error.value.param == "idempotency_key"


def test_a_completion_has_openais_default_length() -> None:
    assert request_from_body(COMPLETIONS_URL, {"prompt": "a"}).max_tokens == 16
    assert request_from_body(COMPLETIONS_URL, {"prompt": ["a"], "max_tokens": 3}).prompt == "a"
    assert request_from_body(COMPLETIONS_URL, {"prompt": [[1, 2]]}).prompt == [1, 2]
    assert request_from_body(COMPLETIONS_URL, {"prompt": [1, 2]}).prompt == [1, 2]


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (CHAT_URL, {"prompt": "a"}, "prompt"),
        (COMPLETIONS_URL, {"messages": MESSAGES}, "messages"),
        (COMPLETIONS_URL, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS_URL, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (CHAT_URL, {"messages": MESSAGES, "functions": []}, "functions"),
        (CHAT_URL, {"messages": "x"}, "messages"),
    ],
)
def test_what_is_not_served_is_refused_by_name(url: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        request_from_body(url, body)
    assert error.value.param == param


def test_a_field_of_openais_that_is_not_served_says_what_to_do_instead() -> None:
    body = {"messages": MESSAGES, "functions": [{"name": "f"}], "reasoning_effort": "low", "verbosity": None}
    with pytest.raises(InvalidJobError) as error:
        request_from_body(CHAT_URL, body)
    assert "functions: is OpenAI's, and not served here; use tools" in str(error.value)
    assert "reasoning_effort: is OpenAI's" in str(error.value) and "response_format" not in str(error.value)
    assert "verbosity" not in str(error.value), "null asks for nothing"


def test_vllms_names_for_the_form_of_an_answer_are_refused_with_ours() -> None:
    with pytest.raises(InvalidJobError) as error:
        request_from_body(CHAT_URL, {"messages": MESSAGES, "guided_json": {"type": "object"}})
    assert str(error.value) == "guided_json: is vLLM's name; use response_format"
    assert error.value.param == "guided_json"


def test_a_result_becomes_a_response() -> None:
    result = Result(
        job_id="j",
        model="m",
        status="finished",
        choices=[Choice(index=0, text="Hi", token_ids=[1], finish_reason="deadline")],
        usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2, cached_tokens=1, reasoning_tokens=1),
    )
    chat = response_body(CHAT_URL, [result], created=5)
    assert chat == {
        "id": "chatcmpl-j",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "total_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    }
    assert response_body(COMPLETIONS_URL, [result], created=5)["choices"][0] == {
        "index": 0,
        "text": "Hi",
        "logprobs": None,
        "finish_reason": "length",
    }


def test_an_outcome_that_is_no_answer_becomes_an_error() -> None:
    request = BatchLine("r1", CHAT_URL, {})
    error = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="too long", param="messages")
    failed = answer_line(request, Result(job_id="j", status="failed", error=error), created=0)
    assert failed["response"]["status_code"] == 400 and failed["error"] is None
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
    cancelled = answer_line(request, Result(job_id="j", status="cancelled"), created=0)
    assert (cancelled["response"], cancelled["error"]["code"]) == (None, "batch_cancelled")


@pytest.mark.parametrize(
    ("url", "field", "ours"),
    [
        (CHAT_URL, {"max_completion_tokens": 9000}, "max_tokens"),
        (CHAT_URL, {"max_tokens": 9000}, "max_tokens"),
        (COMPLETIONS_URL, {"logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_a_worker_says_of_a_lines_field_is_said_of_it_as_the_line_has_it(
    url: str, field: dict[str, int], ours: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", **field}
    line = parse_line(json.dumps({"custom_id": "a", "url": url, "body": body}).encode()).without_body()
    error = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message=f"{ours} is too much, less {ours}", param=ours)
    answer = answer_line(line, Result(job_id="j", status="failed", error=error), created=0)
    [theirs] = field
    said = answer["response"]["body"]["error"]
    assert (said["param"], said["message"]) == (theirs, f"{theirs} is too much, less {theirs}")


def logprob(token_id: int, text: str) -> TokenLogprob:
    top = [TopLogprob(token_id=9, token="x", bytes=[120], logprob=-0.5)]
    return TokenLogprob(token_id=token_id, token=text, bytes=list(text.encode()), logprob=-1.5, top=top)


def test_logprobs_become_openais_in_a_chat_and_behind_an_echoed_prompt() -> None:
    result = Result(
        job_id="j",
        status="finished",
        prompt=PromptEcho(text="one two", token_ids=[1, 2], logprobs=[None, logprob(2, " two")]),
        choices=[
            Choice(index=0, text=" six", token_ids=[3], finish_reason="length", logprobs=[logprob(3, " six")])
        ],
    )  # fmt: skip
    chat = response_body(CHAT_URL, [result], created=5)["choices"][0]["logprobs"]
    assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in chat["content"]] == [
        (" six", list(b" six"), -1.5)
    ]
    assert chat["content"][0]["top_logprobs"] == [{"token": "x", "bytes": [120], "logprob": -0.5}]
    completion = response_body(COMPLETIONS_URL, [result], created=5)["choices"][0]
    assert completion["text"] == "one two six"
    assert completion["logprobs"] == {
        "tokens": ["one", " two", " six"],
        "token_logprobs": [None, -1.5, -1.5],
        "top_logprobs": [None, {"x": -0.5}, {"x": -0.5}],
        "text_offset": [0, 3, 7],
    }
