"""Items of the Responses API to a chat's messages, and back."""

from typing import Any

import pytest

from producer.contract import Message
from producer.errors import InvalidJobError
from producer.openai.responses.items import InputReader, items_of, read_references
from tests.fakes.response_judge import parse_item

CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "c1",
    "name": "look",
    "arguments": "{}",
    "status": "completed",
}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "phase": None,
    "content": [
        {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
        {"type": "refusal", "refusal": "b"},
    ],
}


def read(value: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    reader = InputReader(instructions)
    reader.read(value)
    return reader.messages


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([{"role": "developer", "content": "d"}], [{"role": "developer", "content": "d"}]),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}]}],
            [{"role": "user", "content": [{"type": "text", "text": "t"}]}],
        ),
        ([{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "x"}]),
        ([SAID], [{"role": "assistant", "content": "ab"}]),
        (
            [THOUGHT, SAID, CALL, {**CALL, "call_id": "c2"}],
            [
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "content": "ab",
                    "tool_calls": [TOOL_CALL, {**TOOL_CALL, "id": "c2"}],
                }
            ],
        ),
        (
            [CALL, {"type": "function_call_output", "call_id": "c1", "output": "18"}, SAID],
            [
                {"role": "assistant", "tool_calls": [TOOL_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "18"},
                {"role": "assistant", "content": "ab"},
            ],
        ),
        (
            [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "18"}]}],
            [{"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "18"}]}],
        ),
        ([SAID, SAID], [{"role": "assistant", "content": "ab"}] * 2),
        ([CALL, SAID], [{"role": "assistant", "content": "ab", "tool_calls": [TOOL_CALL]}]),
        (
            [SAID, CALL, SAID, {"type": "function_call_output", "call_id": "c1", "output": "18"}, SAID],
            [
                {"role": "assistant", "content": "abab", "tool_calls": [TOOL_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "18"},
                {"role": "assistant", "content": "ab"},
            ],
        ),
        (
            [CALL, THOUGHT, CALL],
            [
                {"role": "assistant", "tool_calls": [TOOL_CALL]},
                {"role": "assistant", "reasoning": "hm", "tool_calls": [TOOL_CALL]},
            ],
        ),
        (
            [THOUGHT, {"role": "user", "content": "u"}],
            [{"role": "assistant", "reasoning": "hm", "content": ""}, {"role": "user", "content": "u"}],
        ),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "x"}, SAID],
            [{"role": "assistant", "reasoning": "s", "content": "ab"}],
        ),
        ([{"type": "reasoning", "summary": "s"}, SAID], [{"role": "assistant", "reasoning": "s", "content": "ab"}]),
        (
            [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, SAID],
            [{"role": "assistant", "content": "ab"}],
        ),
    ],
)
def test_items_become_messages_and_those_of_one_turn_one(value: Any, messages: list[dict[str, Any]]) -> None:
    assert read(value) == messages
    assert [Message.model_validate(message) for message in messages]
    assert read(value, "Be brief.") == [{"role": "system", "content": "Be brief."}, *messages]


@pytest.mark.parametrize(
    ("value", "param", "says"),
    [
        (5, "input", "must be text or a list of items; got 5"),
        ([], "input", "is empty"),
        (["x"], "input[0]", "must be an object"),
        ([{"role": "tool", "content": "x"}], "input[0].role", "must be user, system, developer or assistant"),
        ([{"role": "user"}], "input[0].content", "is required"),
        ([{"role": "user", "content": 5}], "input[0].content", "must be text or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0].type",
            "only text",
        ),
        ([{"role": "user", "content": [{"type": {}}]}], "input[0].content[0].type", "only text"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text", "is required"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0].type", "a batch's lines stand alone"),
        (["web", {"type": "web_search_call"}][1:], "input[0].type", "'web_search_call' is not served here"),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id", "is required"),
        ([{"type": "function_call_output", "call_id": 5, "output": "x"}], "input[0].call_id", "must be text"),
        ([{"type": "function_call_output", "call_id": "c"}], "input[0].output", "is required"),
    ],
)
def test_what_is_no_item_of_text_is_refused_by_its_place(value: Any, param: str, says: str) -> None:
    with pytest.raises(InvalidJobError) as refused:
        read(value)
    assert refused.value.param == param and str(refused.value).startswith(f"{param}: ") and says in str(refused.value)


@pytest.mark.parametrize("value", ["hi", None, 5, [], [5, SAID, THOUGHT, CALL, {"role": "user", "content": "u"}]])
def test_what_is_given_is_no_reference(value: Any) -> None:
    assert read_references(value) == {}


def test_items_that_are_named_are_found_by_their_places() -> None:
    named: list[Any] = [{"type": "item_reference", "id": "rs_1"}, {"id": "msg_1"}]
    assert read_references([SAID, *named, CALL]) == {1: "rs_1", 2: "msg_1"}
    for item_id, says in ((None, "is required"), (5, "must be text; got 5")):
        with pytest.raises(InvalidJobError, match=says) as refused:
            read_references([*named, {"type": "item_reference", "id": item_id}])
        assert refused.value.param == "input[2].id"


def test_messages_are_listed_as_items_and_read_as_the_same_messages() -> None:
    value = [{"role": "user", "content": "u"}, THOUGHT, SAID, CALL, {**CALL, "call_id": "c2"}]
    value.append({"type": "function_call_output", "call_id": "c1", "output": "18"})
    messages = [Message.model_validate(message) for message in read(value)]
    items = list(items_of(messages, "job"))
    assert [item["type"] for item in items] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call",
        "function_call_output",
    ]
    assert len({item["id"] for item in items}) == len(items)
    assert [parse_item(item).type for item in items] == [item["type"] for item in items]
    assert [Message.model_validate(message).text for message in read(items)] == [message.text for message in messages]
    assert read(items)[1] == read(value)[1]
