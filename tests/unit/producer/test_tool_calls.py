"""Calls of tools on the wire: pieces merge into calls, and what a late reader lacks is computed from both."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import Choice, Chunk, ToolCall, ToolCallDelta, join_deltas, merge_deltas, rest_of_calls
from producer.contract.message import CalledFunctionMessage


def begin(index: int, arguments: str = "") -> ToolCallDelta:
    function: ToolCall = {"id": f"call_{index}", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"index": index, **function}  # type: ignore[typeddict-item]


def more(index: int, arguments: str) -> ToolCallDelta:
    return {"index": index, "function": {"arguments": arguments}}


def call(index: int, arguments: str) -> ToolCall:
    return {"id": f"call_{index}", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_pieces_join_to_the_calls_of_a_result() -> None:
    pieces = [begin(0), more(0, '{"a"'), more(0, ": 1}"), begin(1, "{}")]
    assert join_deltas(pieces) == [call(0, '{"a": 1}'), call(1, "{}")]
    assert merge_deltas(pieces) == [begin(0, '{"a": 1}'), begin(1, "{}")]
    assert pieces[0] == begin(0)  # left as it was
    assert join_deltas([]) is None


@given(st.lists(st.text("{}ab", min_size=1, max_size=8), min_size=1, max_size=4), st.data())
def test_what_was_seen_and_the_rest_are_the_whole(arguments: list[str], data: st.DataObject) -> None:
    calls = [call(index, text) for index, text in enumerate(arguments)]
    seen_calls = data.draw(st.integers(0, len(calls)))
    cut = data.draw(st.integers(0, 8))
    seen = [begin(index, text if index < seen_calls - 1 else text[:cut]) for index, text in enumerate(arguments)]
    seen = seen[:seen_calls]
    assert join_deltas([*seen, *rest_of_calls(calls, seen)]) == calls


def test_the_chunks_of_a_choice_join_to_its_result() -> None:
    chunks = [
        Chunk(job_id="j", reasoning="so ", token_ids=[1]),
        Chunk(job_id="j", index=1, text="other", token_ids=[9], finish_reason="stop"),
        Chunk(job_id="j", reasoning="so", text="I call", token_ids=[2]),
        Chunk(job_id="j", tool_calls=[begin(0)], token_ids=[3]),
        Chunk(job_id="j", tool_calls=[more(0, "{}")], finish_reason="tool_calls"),
    ]
    assert Choice.join(0, chunks, cut_off="error") == Choice(
        index=0,
        text="I call",
        token_ids=[1, 2, 3],
        finish_reason="tool_calls",
        tool_calls=[call(0, "{}")],
        reasoning="so so",
    )
    assert Choice.join(2, chunks, cut_off="cancelled") == Choice(
        index=2, text="", token_ids=[], finish_reason="cancelled"
    )


@pytest.mark.parametrize(
    ("arguments", "parsed"), [("", {}), ("{}", {}), ('{"a": [1]}', {"a": [1]}), ({"a": 2}, {"a": 2})]
)
def test_an_earlier_calls_arguments_are_an_object_where_the_model_wrote_nothing_too(
    arguments: str | dict[str, Any], parsed: dict[str, Any]
) -> None:
    assert CalledFunctionMessage(name="f", arguments=arguments).parsed_arguments == parsed


def test_a_delta_stays_as_it_is_on_the_wire() -> None:
    chunk = Chunk(job_id="j", tool_calls=[begin(0), more(0, "{")])
    assert Chunk.model_validate_json(chunk.to_wire()).tool_calls == [begin(0), more(0, "{")]
