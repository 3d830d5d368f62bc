"""A forced call as a grammar, judged by llguidance: what it accepts is what the parser reads as calls."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.grammar.compiler import GrammarCompiler
from engine.tokenizer import Tokenizer
from producer.contract import JobRequest, join_deltas
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3
from tests.fakes.tiny_tokenizers import END_TOKEN, byte_level_tokenizer
from worker.parsing.call_grammar import call_grammar
from worker.parsing.model_format import ModelFormat, ToolParserName
from worker.parsing.output_plan import OutputPlan

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "now"}}
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>")
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


class Judge:
    """Walks texts through the grammar of a job."""

    def __init__(self, folder: Path, template: str, *, markers: str, prompt_end: str = "", **fields: Any) -> None:
        raw = byte_level_tokenizer()
        if markers != "spelt":
            (raw.add_special_tokens if markers == "special" else raw.add_tokens)(list(MARKERS))
        raw.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(raw)
        request = JobRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields})
        tool_parser: ToolParserName = "llama" if template == LLAMA else "auto"  # the tag may be missing here
        model_format = ModelFormat.select(self.tokenizer, [template], tool_parser=tool_parser)
        self.plan = OutputPlan.of_chat(request, prompt_end, model_format)
        assert self.plan is not None
        spec = call_grammar(request, self.plan, model_format)
        assert spec is not None
        end_id = raw.token_to_id(END_TOKEN)
        compiler = GrammarCompiler(str(folder), vocab_size=raw.get_vocab_size(), eos_token_ids=(end_id,))
        self.matcher = compiler.compile(spec)

    def accepts(self, text: str) -> bool:
        matcher = self.matcher.deep_copy()
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            if matcher.validate_tokens([token_id]) != 1:
                return False
            assert matcher.consume_token(token_id)
        return bool(matcher.is_accepting())


@pytest.mark.parametrize("markers", ["special", "plain", "spelt"])
def test_required_takes_one_call_or_several_and_nothing_else(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, HERMES, markers=markers, tool_choice="required")
    assert judge.accepts(WEATHER) and judge.accepts(NOW) and judge.accepts(f"{NOW}\n{WEATHER}\n{NOW}")
    for wrong in ["", "Hello", NOW[:-1], WEATHER.replace("2", "10"), WEATHER.replace("city", "town"), f"{NOW} ok"]:
        assert not judge.accepts(wrong), wrong
    assert not judge.accepts(NOW.replace("{}", '{"made": "up"}'))


def test_a_call_that_must_not_be_parallel_or_is_named_comes_once(tmp_path: Path) -> None:
    single = Judge(tmp_path, HERMES, markers="plain", tool_choice="required", parallel_tool_calls=False)
    assert single.accepts(WEATHER) and not single.accepts(f"{NOW}\n{NOW}")
    named = Judge(tmp_path, HERMES, markers="plain", tool_choice=NAMED)
    assert named.accepts(NOW) and not named.accepts(WEATHER) and not named.accepts(f"{NOW}\n{NOW}")


def test_llamas_call_is_bare(tmp_path: Path) -> None:
    judge = Judge(tmp_path, LLAMA, markers="special", tool_choice="required")
    assert judge.accepts('{"name": "get_weather", "parameters": {"city": "Rome"}}')
    assert judge.accepts('{"name": "now", "parameters": {}}') and not judge.accepts('{"name": "no", "parameters": {}}')


@pytest.mark.parametrize("markers", ["special", "plain", "spelt"])
def test_a_model_that_thinks_may_think_before_it_calls(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, QWEN3, markers=markers, tool_choice="required")
    assert judge.accepts(NOW) and judge.accepts(f"<think>\nSo <b>.\n</think>\n\n{NOW}")
    assert not judge.accepts("<think>\nSo.\n</think>\n\nHello") and not judge.accepts(f"So. {NOW}")
    inside = Judge(tmp_path, QWEN3, markers=markers, tool_choice="required", prompt_end="x<think>\n")
    assert inside.accepts(f"So.\n</think>\n\n{NOW}") and not inside.accepts(NOW)


@pytest.mark.parametrize("template", [HERMES, LLAMA, QWEN3], ids=["hermes", "llama", "qwen3"])
@pytest.mark.parametrize("markers", ["special", "plain", "spelt"])
def test_whatever_the_grammar_lets_through_is_read_as_valid_calls(tmp_path: Path, template: str, markers: str) -> None:
    judge = Judge(tmp_path, template, markers=markers, tool_choice="required")
    assert judge.plan is not None
    num_ended = 0
    for seed in range(6):
        text, has_ended = _walk(judge, random.Random(seed))
        parsed = judge.plan.build_parser("job", 0).read(text, "stop")
        if not has_ended:
            continue
        num_ended += 1
        calls = join_deltas(parsed.tool_calls)
        assert calls and parsed.text == "" and parsed.finish_reason == "tool_calls", text
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(
                arguments, SCHEMA if call["function"]["name"] == "get_weather" else {"maxProperties": 0}
            )


def _walk(judge: Judge, choices: random.Random) -> tuple[str, bool]:
    """A random sentence of the grammar; whether it came to an end."""
    table = judge.tokenizer.token_bytes
    shown = table.showing(judge.plan.visible_token_ids if judge.plan else ())
    matcher, data = judge.matcher.deep_copy(), b""
    for _ in range(400):
        allowed = [at for at, is_allowed in enumerate(matcher.compute_logit_bias()) if is_allowed]
        is_end = matcher.is_accepting() and choices.random() < 0.5
        token_id = allowed[-1] if is_end else choices.choice(allowed)
        if matcher.is_accepting() and is_end:
            return data.decode(errors="replace"), True
        assert matcher.consume_token(token_id)
        data += shown[token_id]
        if matcher.is_stopped():
            return data.decode(errors="replace"), True
    return data.decode(errors="replace"), False
