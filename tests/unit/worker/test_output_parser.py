"""Calls, thoughts and content told apart in text that comes in pieces: what comes out depends on the text alone."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.contract import ToolCallDelta, join_deltas
from worker.parsing.output_parser import OutputParser
from worker.parsing.parsed_text import ParsedText
from worker.parsing.reasoning_parser import ReasoningParser
from worker.parsing.tool_call_parser import HERMES, LLAMA, ToolCallFormat, ToolCallParser

NAMES = ("get_weather", "add")


def parser(
    call_format: ToolCallFormat | None = HERMES,
    *,
    thinks: bool = False,
    begins_inside: bool = False,
    max_calls: int | None = None,
    is_forced: bool = False,
) -> OutputParser:
    calls: ToolCallParser | None = None
    if call_format is not None:
        calls = ToolCallParser(
            call_format,
            tool_names=NAMES,
            call_id=lambda number: f"id{number}",
            max_calls=max_calls,
            is_forced=is_forced,
        )
    return OutputParser(ReasoningParser(begins_inside=begins_inside) if thinks else None, calls)


def joined(pieces: list[ParsedText]) -> tuple[str, str, list[Any] | None]:
    deltas: list[ToolCallDelta] = [delta for piece in pieces for delta in piece.tool_calls]
    return (
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        join_deltas(deltas),
    )


def parse(text: str, call_format: ToolCallFormat | None = HERMES, **options: Any) -> tuple[str, str, list[Any] | None]:
    """A whole text, character by character, and once more at one go: both must agree."""
    one_by_one, at_once = parser(call_format, **options), parser(call_format, **options)
    pieces = [*(one_by_one.read(character) for character in text), one_by_one.read("", "stop")]
    whole = at_once.read(text, "stop")
    assert joined(pieces) == joined([whole])
    assert pieces[-1].finish_reason == whole.finish_reason
    return joined(pieces)


def calls(*named: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": f"id{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(named)
    ]


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "\\ud83d", "arguments": {"a": 1}}',
        '{"\\ud83d": 1, "name": "add", "arguments": {"a": 1}}',
        '{"name": "add", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}',
    ],
)
def test_what_holds_half_a_surrogate_pair_is_no_call(call: str) -> None:
    """JSON can write it; a stream, which is UTF-8, cannot."""
    content, _, found = parse(f"<tool_call>{call}</tool_call>")
    assert content.startswith("<tool_call>") and call in content and found is None


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("Hello <b>you</b> & co. \n", "Hello <b>you</b> & co. \n", None),
        ('<tool_call>\n{"name": "add", "arguments": {"b": [2, 3]}}\n</tool_call>', "", [("add", '{"b": [2, 3]}')]),
        ('<tool_call>{"name":"add","arguments":{}}</tool_call>\n', "", [("add", "{}")]),
        ('Let me see.\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', "Let me see.", [("add", "{}")]),
        (
            '<tool_call>\n{"name": "add", "arguments": {"a": "}</tool_call>\\"{"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>',
            "",
            [("add", '{"a": "}</tool_call>\\"{"}'), ("get_weather", '{"city": "Köln"}')],
        ),
        ('<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "unheard_of", "arguments": {}}', "", [("unheard_of", "{}")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": null, "id": 7}</tool_call>', "", [("add", "{}")]),
        ('A <tool_call>{"name": "add", "arguments": {}}</tool_call> B', "A B", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {}}</tool', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call></tool_call>', "</tool_call>", [("add", "{}")]),
    ],
)  # fmt: skip
def test_hermes_calls_are_read(text: str, content: str, expected: list[tuple[str, str]] | None) -> None:
    assert parse(text) == (content, "", expected and calls(*expected))


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
        ('\n\n{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
        ('<|python_tag|>{"name": "unheard_of", "parameters": {}}', "", [("unheard_of", "{}")]),
        (
            '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "get_weather", "parameters": {"city": ""}}',
            "",
            [("add", "{}"), ("get_weather", '{"city": ""}')],
        ),
        ('Sure. <|python_tag|>{"name": "add", "parameters": {}}', "Sure.", [("add", "{}")]),
        ('{"name": "add", "parameters": {}} is what I would call', "is what I would call", [("add", "{}")]),
        ('{"name": "Alice", "parameters": {"a": 1}}', '{"name": "Alice", "parameters": {"a": 1}}', None),
        ('{"answer": 42, "name": "add", "parameters": {}}', '{"answer": 42, "name": "add", "parameters": {}}', None),
        ('The JSON is {"name": "add", "parameters": {}}', 'The JSON is {"name": "add", "parameters": {}}', None),
        ('<|python_tag|>add.call(a=1)', '<|python_tag|>add.call(a=1)', None),
    ],
)  # fmt: skip
def test_llama_calls_are_read(text: str, content: str, expected: list[tuple[str, str]] | None) -> None:
    assert parse(text, LLAMA) == (content, "", expected and calls(*expected))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON\n</tool_call>",
        '<tool_call>\n{"name": "add", "arguments": {\'a\': 1}}\n</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "name": "add", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "many"}</tool_call> and then',
        '<tool_call>{"name": "add", "argum',
        "text <tool_call> ",
        "<tool_call><tool_call></tool_call>",
        "a < b <tool",
        '{"name": "add", "arguments": {}}',
    ],
)
def test_what_is_no_call_comes_back_as_content_to_the_character(text: str) -> None:
    assert parse(text) == (text, "", None)


def test_a_call_behind_a_broken_one_is_read() -> None:
    good = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert parse(f"<tool_call>\n{{oops\n</tool_call>\n{good}")[::2] == (
        "<tool_call>\n{oops\n</tool_call>", calls(("add", "{}")),
    )  # fmt: skip
    assert parse(f'<tool_call>{{"name": {good}')[::2] == ('<tool_call>{"name":', calls(("add", "{}")))


def test_arguments_that_break_after_they_were_shown_end_there_and_the_rest_is_content() -> None:
    text, _, made = parse('<tool_call>{"name": "add", "arguments": {"a": §1}}</tool_call>')
    assert (text, made) == ("§1}}</tool_call>", calls(("add", '{"a": ')))
    text, _, made = parse('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call> ok')
    assert (text, made) == ("ok", calls(("add", '{"a": 1')))
    text, _, made = parse('<tool_call>{"name": "add", "arguments": {}, "parameters": {"a": 1}}')
    assert (text, made) == ('": {"a": 1}}', calls(("add", "{}")))


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("hello", "stop", "stop"),
        ('<tool_call>{"name": "add", "arguments": {}}', "stop", "tool_calls"),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call> done', "stop", "tool_calls"),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', "length", "length"),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', None, None),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "stop", "stop"),
        ('<tool_call>{"name": "add", "arguments": {"a": §', "stop", "stop"),
    ],
)
def test_a_choice_that_stopped_ends_with_calls_if_every_one_is_whole(text: str, given: Any, expected: Any) -> None:
    assert parser().read(text, given).finish_reason == expected


def test_the_name_comes_first_and_the_arguments_as_they_are_written() -> None:
    made = parser()
    assert made.read('<tool_call>\n{"name": "add", "arg') == ParsedText()
    assert made.read('uments": {"') == ParsedText(
        tool_calls=(
            {"index": 0, "id": "id0", "type": "function", "function": {"name": "add", "arguments": ""}},
            {"index": 0, "function": {"arguments": '{"'}},
        )
    )
    assert made.read('a": 1') == ParsedText(tool_calls=({"index": 0, "function": {"arguments": 'a": 1'}},))
    assert made.read("}}\n</tool_call>") == ParsedText(tool_calls=({"index": 0, "function": {"arguments": "}"}},))


def test_content_is_held_back_only_while_it_may_begin_a_marker() -> None:
    made = parser()
    assert made.read("a <b> <to").text == "a <b>"
    assert made.read("ol").text == ""
    assert made.read("s>").text == " <tools>"
    bare = parser(LLAMA)
    assert bare.read('{"na').text == ""
    assert bare.read('me": "Bob"').text == ""
    assert bare.read(",").text == '{"name": "Bob",'


def test_calls_beyond_the_limit_are_left_out() -> None:
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    assert parse(one * 3, max_calls=1) == ("", "", calls(("add", '{"a": 1}')))
    assert parser(max_calls=1).read(one + one[:45], "stop").finish_reason == "tool_calls"
    assert parser(is_forced=True).read(one + one[:15], "stop").finish_reason == "stop", "that one is cut off"


@pytest.mark.parametrize(
    ("text", "begins_inside", "content", "reasoning"),
    [
        ("<think>\nSo.\n\nYes.\n</think>\n\nParis. ", False, "Paris. ", "So.\n\nYes."),
        ("\n<think>so</think>Paris", False, "Paris", "so"),
        ("So.\n</think>\n\nParis", True, "Paris", "So."),
        ("Paris <think>so</think>", False, "Paris <think>so</think>", ""),
        ("  Paris", False, "  Paris", ""),
        ("<think>\n\n</think>\n\nParis", False, "Paris", ""),
        ("<think>without an end </th", False, "", "without an end </th"),
        ("<thi", False, "<thi", ""),
        ("so</think>", True, "", "so"),
        ("so </b> on\n", True, "", "so </b> on"),
    ],
)
def test_a_thought_is_told_from_the_answer(text: str, begins_inside: bool, content: str, reasoning: str) -> None:
    assert parse(text, None, thinks=True, begins_inside=begins_inside) == (content, reasoning, None)


def test_a_call_in_a_thought_is_a_thought_and_one_behind_it_a_call() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert parse(f"<think>\n{call}\n</think>\n\n{call}", thinks=True) == ("", call, calls(("add", "{}")))
    bare = '{"name": "add", "parameters": {}}'
    assert parse(f"<think>x</think>\n\n{bare}", LLAMA, thinks=True) == ("", "x", calls(("add", "{}")))


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "\n", " ", "{", "}", '"name"', ": ",
    '"add"', ', "arguments"', '"parameters": {', '{"name": "add", "arguments": {', '"', "\\", "[", "]", ",", ";", "<",
    '{"name": "get_weather", "parameters": {}}', "tool", "ü", "§", "1", '"a": "b"', "null", '"extra": 1', "text",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=24),
    call_format=st.sampled_from([HERMES, LLAMA, None]),
    thinks=st.booleans(),
    begins_inside=st.booleans(),
    max_calls=st.sampled_from([None, 1]),
    data=st.data(),
)
def test_what_was_given_depends_on_the_text_so_far_and_not_on_its_pieces(
    fragments: list[str], data: st.DataObject, **options: Any
) -> None:
    text = "".join(fragments)
    call_format = options.pop("call_format")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    cut_up = parser(call_format, **options)
    pieces: list[ParsedText] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces.append(cut_up.read(text[start:end]))
        at_once = parser(call_format, **options)
        assert joined(pieces) == joined([at_once.read(text[:end])])
    pieces.append(cut_up.read("", "stop"))
    assert joined(pieces) == parse(text, call_format, **options)


@pytest.mark.parametrize(
    ("call_format", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n' * 2),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}'),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}'),
    ],
)
def test_of_forced_calls_that_are_cut_off_nothing_is_content(call_format: ToolCallFormat, text: str) -> None:
    whole = parse(text, call_format, is_forced=True)[2]
    for length in range(len(text) + 1):
        content, _, found = parse(text[:length], call_format, is_forced=True)
        assert content == "" and len(found or []) <= len(whole or [])
    assert parse(text[:20], call_format)[0] != "", "else it may be what the model wanted to say"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=3))
@pytest.mark.parametrize(("call_format", "key"), [(HERMES, "arguments"), (LLAMA, "parameters")])
def test_any_arguments_come_through_as_they_were_written(
    call_format: ToolCallFormat, key: str, arguments: dict[str, Any]
) -> None:
    written = json.dumps(arguments)
    text = f'{call_format.opens}{{"name": "add", "{key}": {written}}}{call_format.closes or ""}'
    assert parse(text, call_format) == ("", "", calls(("add", written)))
