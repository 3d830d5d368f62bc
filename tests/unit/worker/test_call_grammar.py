"""A forced call as a grammar, judged by llguidance: what it accepts is what the parser reads as calls."""

import random
from pathlib import Path
from typing import Any

import pytest

from producer.contract import join_deltas
from tests.fakes.call_judge import Judge
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3

NAMED = {"type": "function", "function": {"name": "now"}}
ANSWER = '{"town": "Rome"}'
TOWN: Any = {"type": "object", "properties": {"town": {"type": "string", "maxLength": 8}}, "required": ["town"]}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "town", "schema": TOWN}}
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


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


@pytest.mark.parametrize("markers", ["special", "plain", "spelt"])
def test_an_answer_has_its_form_and_calls_may_come_in_its_place(tmp_path: Path, markers: str) -> None:
    judge = Judge(tmp_path, HERMES, markers=markers, response_format=FORM)
    assert judge.accepts(ANSWER) and judge.accepts(NOW) and judge.accepts(f"{NOW}\n{WEATHER}")
    for wrong in ["", "Hello", '{"town": 5}', ANSWER + NOW, f"{NOW}\n{ANSWER}", NOW.replace("now", "then")]:
        assert not judge.accepts(wrong), wrong
    said = ANSWER.replace("Rome", "<tool_call>")
    assert judge.read(said).text == said and not judge.read(said).tool_calls
    any_object = Judge(tmp_path, HERMES, markers=markers, response_format={"type": "json_object"})
    assert any_object.accepts('{"a": 1}') and any_object.accepts(NOW) and not any_object.accepts("5")


def test_a_call_that_is_forced_comes_in_place_of_an_answer_in_any_form(tmp_path: Path) -> None:
    named = Judge(tmp_path, QWEN3, markers="plain", tool_choice=NAMED, response_format=FORM)
    assert named.accepts(NOW) and named.accepts(f"<think>So.</think>{NOW}") and not named.accepts(ANSWER)


@pytest.mark.parametrize("template", [HERMES, LLAMA, QWEN3], ids=["hermes", "llama", "qwen3"])
@pytest.mark.parametrize("markers", ["special", "plain", "spelt"])
def test_whatever_the_grammar_lets_through_is_read_as_valid_calls(tmp_path: Path, template: str, markers: str) -> None:
    judge = Judge(tmp_path, template, markers=markers, tool_choice="required")
    for seed in range(6):
        text, has_ended = judge.walk(random.Random(seed))
        if has_ended:
            parsed = judge.read(text)
            assert join_deltas(parsed.tool_calls) and parsed.text == "", text
            assert parsed.finish_reason == "tool_calls", text
