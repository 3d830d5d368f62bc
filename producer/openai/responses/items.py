"""Items of OpenAI's Responses API to a chat's messages, and messages to items. Pure.

A turn of the assistant is one message of a chat, and several items: what it thought, what it said, each call it made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from producer.contract import Message
from producer.errors import InvalidJobError

_ROLES = ("user", "system", "developer", "assistant")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}  # and the field of each with its text
_THOUGHT_PARTS = {"reasoning_text": "text", "summary_text": "text"}


class InputReader:
    """Reads a request's `input`. `messages` are a chat's, unchecked but for what makes an item one; `places` says which
    item each came from, by the name that a chat has for it."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None  # of the assistant, while the items are its own
        self._message_places: dict[str, str] = {}
        self._field_places: dict[str, str] = {}
        if instructions:
            self.messages.append({"role": "system", "content": instructions})
            self._field_places["messages[0].content"] = "instructions"

    @property
    def places(self) -> dict[str, str]:
        return {**self._field_places, **self._message_places}

    def read(self, value: Any) -> None:
        """Raises InvalidJobError naming the item."""
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise _fault("input", f"must be text or a list of items; got {value!r:.60}")
        if not value:
            raise _fault("input", "is empty; give at least one item")
        for at, item in enumerate(value):
            self._read_item(item, f"input[{at}]")
        for message in self.messages:
            if message["role"] == "assistant" and "tool_calls" not in message:
                message.setdefault("content", "")  # a thought that nothing followed

    def _read_item(self, item: Any, where: str) -> None:
        if not isinstance(item, Mapping):
            raise _fault(where, f"must be an object; got {item!r:.60}")
        match item.get("type") or "message":
            case "message":
                self._read_message(item, where)
            case "reasoning":
                self._read_thought(item, where)
            case "function_call":
                self._read_call(item, where)
            case "function_call_output":
                content = _content(item.get("output"), f"{where}.output")
                call_id = _text(item.get("call_id"), f"{where}.call_id")
                place = f"messages[{len(self.messages)}]"
                self._field_places |= {
                    f"{place}.content": f"{where}.output",
                    f"{place}.tool_call_id": f"{where}.call_id",
                }
                self._add({"role": "tool", "tool_call_id": call_id, "content": content}, where)
            case "item_reference":
                raise _fault(f"{where}.type", "'item_reference': a batch's lines stand alone; send the item itself")
            case other:
                raise _fault(f"{where}.type", f"{other!r:.60} is not served here; leave the item out")

    def _read_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise _fault(f"{where}.role", f"must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}; got {role!r:.60}")
        content = _content(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._add({"role": role, "content": content}, where)
            return
        # Text behind a call is of the same turn: the next one would follow on the call's output.
        has_spoken = self._turn is not None and "content" in self._turn and "tool_calls" not in self._turn
        turn = self._open_turn(where, is_new=has_spoken)
        turn["content"] = turn.get("content", "") + _joined(content)

    def _read_thought(self, item: Mapping[str, Any], where: str) -> None:
        """What was thought, or a summary of it; one that is encrypted alone says nothing here."""
        name = "content" if item.get("content") else "summary"
        if thought := _joined(_content(item.get(name) or [], f"{where}.{name}", _THOUGHT_PARTS)):
            turn = self._open_turn(where, is_new=self._turn is not None and self._turn.keys() != {"role", "reasoning"})
            turn["reasoning"] = turn.get("reasoning", "") + thought

    def _read_call(self, item: Mapping[str, Any], where: str) -> None:
        function = {name: _text(item.get(name), f"{where}.{name}") for name in ("name", "arguments")}
        call = {"id": _text(item.get("call_id"), f"{where}.call_id"), "type": "function", "function": function}
        calls = self._open_turn(where, is_new=False).setdefault("tool_calls", [])
        place = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self._field_places |= {f"{place}.function": where, f"{place}.id": f"{where}.call_id"}
        calls.append(call)

    def _open_turn(self, where: str, *, is_new: bool) -> dict[str, Any]:
        """The assistant's turn that the item belongs to."""
        if self._turn is None or is_new:
            turn: dict[str, Any] = {"role": "assistant"}
            self._add(turn, where)
            self._turn = turn
        return self._turn

    def _add(self, message: dict[str, Any], where: str) -> None:
        self._turn = None
        self._message_places[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)


def read_references(value: Any) -> dict[int, str]:
    """Of a request's `input`: the ids of the items that it names instead of giving them, by their places. Raises
    InvalidJobError."""
    items = enumerate(value if isinstance(value, list) else ())
    return {at: _text(item.get("id"), f"input[{at}].id") for at, item in items if _is_reference(item)}


def _is_reference(item: Any) -> bool:
    return isinstance(item, Mapping) and (item.get("type") == "item_reference" or item.keys() == {"id"})


def items_of(messages: Sequence[Message], job_id: str) -> Iterator[dict[str, Any]]:
    """The items that `messages` were, in full form. Their ids follow from the job's, and are none of its output's."""
    for at, message in enumerate(messages):
        key, done = f"{job_id}_in{at}", {"status": "completed"}
        if message.role == "tool":
            output = {"call_id": message.tool_call_id, "output": message.text}
            yield {"id": f"fco_{key}", "type": "function_call_output", **output, **done}
            continue
        if message.reasoning:
            thought = [{"type": "reasoning_text", "text": message.reasoning}]
            yield {"id": f"rs_{key}", "type": "reasoning", "summary": [], "content": thought, **done}
        if message.text or not message.tool_calls:
            part = {"type": "output_text", "text": message.text, "annotations": [], "logprobs": []}
            parts = [part] if message.role == "assistant" else [{"type": "input_text", "text": message.text}]
            yield {"id": f"msg_{key}", "type": "message", "role": message.role, "content": parts, **done}
        for number, call in enumerate(message.tool_calls or ()):
            arguments = call.function.arguments
            function = {
                "call_id": call.id or "",
                "name": call.function.name,
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            }
            yield {"id": f"fc_{key}_{number}", "type": "function_call", **function, **done}


def _content(value: Any, where: str, kinds: Mapping[str, str] = _TEXT_PARTS) -> str | list[dict[str, str]]:
    """Text, or a chat's text parts. Raises InvalidJobError naming the part."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        rule = "is required" if value is None else f"must be text or a list of parts; got {value!r:.60}"
        raise _fault(where, rule)
    parts = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            rule = f"only text is read here, parts of type {' or '.join(kinds)}; got {kind or part!r:.60}"
            raise _fault(f"{where}[{at}].type", rule)
        parts.append({"type": "text", "text": _text(part.get(kinds[kind]), f"{where}[{at}].{kinds[kind]}")})
    return parts


def _joined(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _fault(where, "is required" if value is None else f"must be text; got {value!r:.60}")
    return value


def _fault(param: str, rule: str) -> InvalidJobError:
    return InvalidJobError(f"{param}: {rule}", param=param)
