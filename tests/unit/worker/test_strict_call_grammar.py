"""Strict tools under `auto`: text is free, and every call that the parser would read in it is valid."""

import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from producer.contract import ErrorCode, JobRequest, join_deltas
from tests.fakes.call_judge import TOOLS, Judge
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3
from worker.errors import JobRefusedError
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_plan import OutputPlan
from worker.parsing.tool_call_parser import LLAMA as LLAMA_CALLS
from worker.parsing.tool_call_parser import ToolCallFormat

STRICT: list[dict[str, Any]] = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_NOW = '{"name": "now", "parameters": {}}'
OBJECT: dict[str, Any] = {"response_format": {"type": "json_object"}}
ALL_MARKERS = ["special", "plain", "spelt"]
BAD = '{"name": "now", "arguments": {"a": 1}}'
PIECES: list[tuple[str, ...]] = [  # of more than one part: a marker that is spelt out
    *((text,) for text in ("Hello", " ", "\n", "{", "}", "<tool_call>", "</tool_call>", "<think>", "</think>")),
    *((text,) for text in (NOW, BAD, LLAMA_NOW, "<|python_tag|>", '{"name": "get_weather", "parameters": {}}')),
    *(("<tool", "_call>"), ("<tool", f"_call>\n{BAD}"), ("</th", "ink>"), ("<|python", f"_tag|>{BAD}")),
]


@pytest.mark.parametrize("markers", ALL_MARKERS)
def test_text_is_free_and_calls_are_valid(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, HERMES, markers=markers, tools=STRICT)
    for right in [
        "Hello {you} <tool",
        "",
        NOW,
        f"Let me see.\n{WEATHER}",
        f"{NOW}\n{WEATHER} and so on",
        "<tool_ call>",
    ]:
        assert judge.accepts(right), right
    for wrong in [
        WEATHER.replace("2", "10"),
        NOW.replace("{}", '{"made": "up"}'),
        "<tool_call>",
        f"{NOW}<tool_call> x",
    ]:
        assert not judge.accepts(wrong), wrong
    single = Judge(tmp_path, HERMES, markers=markers, tools=STRICT, parallel_tool_calls=False)
    assert single.accepts(f"a {NOW} b") and not single.accepts(f"{NOW}\n{NOW}")


def test_a_tool_that_is_not_strict_takes_any_object_beside_one_that_is(tmp_path: Path) -> None:
    judge = Judge(tmp_path, HERMES, markers="plain", tools=[STRICT[0], TOOLS[1]])
    assert judge.accepts(NOW.replace("{}", '{"made": "up"}')) and not judge.accepts(NOW.replace("{}", "5"))
    assert not judge.accepts(WEATHER.replace("city", "town"))


@pytest.mark.parametrize("markers", ["special", "spelt"])
def test_llamas_answer_that_begins_with_a_brace_is_a_call(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, LLAMA, markers=markers, tools=STRICT)
    for right in ["Hello {you}", LLAMA_NOW, f"\n{LLAMA_NOW}", f"Well:<|python_tag|>{LLAMA_NOW}"]:
        assert judge.accepts(right), right
    for wrong in [
        '{"name": "now", "parameters": 5}',
        "\n{ }",
        f"x<|python_tag|>{LLAMA_NOW[:-1]}",
        "{",
        "<|python_tag|>x",
    ]:
        assert not judge.accepts(wrong), wrong


@pytest.mark.parametrize("markers", ALL_MARKERS)
def test_thoughts_are_free(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, QWEN3, markers=markers, tools=STRICT)
    for right in [
        f"<think>\nSo {{\n</think>\n\n{NOW}",
        "<think>So.</think>Hello",
        "<think>So",
        f"\n<think>a</think>{NOW}",
    ]:
        assert judge.accepts(right), right
    assert not judge.accepts(f"<think>So.</think>{NOW.replace('now', 'then')}")
    inside = Judge(tmp_path, QWEN3, markers=markers, tools=STRICT, prompt_end="x<think>\n")
    assert inside.accepts(f"So.\n</think>\n\n{NOW}") and inside.accepts("So.")


@pytest.mark.parametrize("template", [HERMES, LLAMA, QWEN3], ids=["hermes", "llama", "qwen3"])
@pytest.mark.parametrize("markers", ALL_MARKERS)
def test_no_text_that_is_let_through_is_read_as_an_invalid_call(tmp_path: Path, template: str, markers: str) -> None:
    judge = Judge(tmp_path, template, markers=markers, tools=STRICT)
    choices = random.Random(11)
    num_calls = num_accepted = 0
    for _ in range(500):
        pieces = [part for piece in choices.choices(PIECES, k=choices.randint(1, 5)) for part in piece]
        if judge.accepts(*pieces):
            num_accepted += 1
            num_calls += len(join_deltas(judge.read("".join(pieces)).tool_calls) or ())
    for seed in range(20):
        opens = "<|python_tag|>" if template == LLAMA else "<tool_call>"
        text, has_ended = judge.walk(random.Random(seed), choices.choice(["", "Well.", opens, f"a{opens}", opens]))
        if has_ended:
            num_calls += len(join_deltas(judge.read(text).tool_calls) or ())
    assert num_accepted > 50 and num_calls > 10


def test_the_parser_would_read_invalid_calls_without_the_grammar(tmp_path: Path) -> None:
    judge = Judge(tmp_path, HERMES, markers="plain", tools=STRICT)
    with pytest.raises(jsonschema.ValidationError):
        judge.read(WEATHER.replace("2", "10"))


@pytest.mark.parametrize(
    ("calls", "fields", "param", "says"),
    [
        (None, {"tools": STRICT}, "tools", "strict cannot be held"),
        (None, {"tools": TOOLS, **OBJECT}, "response_format", "cannot be held beside tools"),
        (LLAMA_CALLS, {"tools": TOOLS, **OBJECT}, "response_format", "cannot be held beside tools"),
    ],
)
def test_what_cannot_be_held_is_refused(
    calls: ToolCallFormat | None, fields: dict[str, Any], param: str, says: str
) -> None:
    request = JobRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    with pytest.raises(JobRefusedError, match=says) as refusal:
        OutputPlan.of_chat(request, "", ModelFormat(calls, "none", has_reasoning=False))
    assert (refusal.value.info.code, refusal.value.info.param) == (ErrorCode.UNSUPPORTED, param)
