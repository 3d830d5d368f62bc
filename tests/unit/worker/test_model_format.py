"""How a model writes calls and thoughts, told from its template and its vocabulary; and what that means for one job."""

from typing import Any

import pytest

from engine.tokenizer import Tokenizer
from producer.contract import ErrorCode, JobRequest
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3
from tests.fakes.tiny_tokenizers import byte_level_tokenizer
from worker.errors import JobRefusedError
from worker.parsing import tool_call_parser
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_plan import OutputPlan

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def tokenizer(*, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Tokenizer:
    raw = byte_level_tokenizer()
    raw.add_special_tokens(list(special))
    raw.add_tokens(list(plain))
    return Tokenizer(raw)


def request(**fields: Any) -> JobRequest:
    return JobRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize(
    ("template", "vocabulary", "expected", "has_reasoning"),
    [
        (HERMES, (), tool_call_parser.HERMES, False),
        (QWEN3, (), tool_call_parser.HERMES, True),
        (LLAMA, ("<|python_tag|>",), tool_call_parser.LLAMA, False),
        (LLAMA, (), None, False),
        ("{{ '<|python_tag|>' }}", (), tool_call_parser.LLAMA, False),
        ("{{ '<tool_call><function=' ~ tools ~ arguments }}", (), None, False),
        ("{{ '[TOOL_CALLS]' ~ tools }}", (), None, False),
        ("{{ messages[0].content.split('</think>')[-1] }}", (), None, True),
        ("", (), None, False),
    ],
    ids=["hermes", "qwen3", "llama", "llama without its tag", "tag", "qwen coder", "mistral", "deepseek", "none"],
)
def test_the_template_tells_how_calls_are_written(
    template: str, vocabulary: tuple[str, ...], expected: Any, has_reasoning: bool
) -> None:
    found = ModelFormat.select(tokenizer(special=vocabulary), [template])
    assert (found.tool_calls, found.has_reasoning) == (expected, has_reasoning)


def test_a_setting_outweighs_the_template() -> None:
    found = ModelFormat.select(tokenizer(), [QWEN3], tool_parser="llama", reasoning_parser="none")
    assert (found.tool_calls, found.has_reasoning) == (tool_call_parser.LLAMA, False)
    assert ModelFormat.select(tokenizer(), [HERMES], tool_parser="none").tool_calls is None
    assert ModelFormat.select(tokenizer(), [HERMES], reasoning_parser="think").has_reasoning


def test_the_engine_is_asked_to_show_the_markers_that_are_tokens() -> None:
    mixed = tokenizer(special=("<think>", "</think>", "<other>"), plain=("<tool_call>",))
    found = ModelFormat.select(mixed, [QWEN3])
    assert list(found.marker_tokens) == ["<think>", "</think>", "<tool_call>"]
    plan = OutputPlan.of_chat(request(), "p", found)
    assert plan is not None and plan.visible_token_ids == tuple(found.marker_tokens.values())
    assert ModelFormat.select(tokenizer(), [HERMES]).marker_tokens == {}


def test_a_job_without_anything_to_read_has_no_plan() -> None:
    hermes, qwen = (ModelFormat.select(tokenizer(), [template]) for template in (HERMES, QWEN3))
    assert OutputPlan.of_chat(request(), "p", hermes) is None
    assert OutputPlan.of_chat(request(tools=TOOLS, tool_choice="none"), "p", hermes) is None
    assert OutputPlan.of_chat(request(), "p", qwen) is not None
    thinking = OutputPlan.of_chat(request(), "<|assistant|><think>\n", qwen)
    assert thinking is not None and thinking.begins_in_reasoning
    assert OutputPlan.of_chat(request(regex="a+", response_format={"type": "text"}), "p", qwen) is None


def test_calls_that_cannot_be_read_are_refused_unless_text_was_asked_for() -> None:
    unknown = ModelFormat.select(tokenizer(), ["{{ tools }}"])
    with pytest.raises(JobRefusedError, match="--tool-parser hermes or llama") as caught:
        OutputPlan.of_chat(request(tools=TOOLS), "p", unknown)
    assert (caught.value.info.code, caught.value.info.param) == (ErrorCode.UNSUPPORTED, "tools")
    as_text = ModelFormat.select(tokenizer(), ["{{ tools }}"], tool_parser="none")
    assert OutputPlan.of_chat(request(tools=TOOLS), "p", as_text) is None
    with pytest.raises(JobRefusedError, match="cannot force a call") as caught:
        OutputPlan.of_chat(request(tools=TOOLS, tool_choice="required"), "p", as_text)
    assert caught.value.info.param == "tool_choice"
