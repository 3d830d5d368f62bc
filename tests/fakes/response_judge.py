"""The official client's types as the judge of `/v1/responses`: strictly, and events in the order OpenAI documents."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

_EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
_ITEM: TypeAdapter[ResponseItem] = TypeAdapter(ResponseItem)

_TEXT = "(?:{0}[+] part[+] (?:{0}~ )*{0}! part! {0}item! )"
_ORDER = re.compile(
    "created (?:queued )?running "
    f"(?:{_TEXT.format('reasoning')}|{_TEXT.format('message')}|call[+] (?:call~ )*call! callitem! )*"
    "(?:completed|incomplete|failed) "
)
_WORDS = {
    "response.created": "created",
    "response.queued": "queued",
    "response.in_progress": "running",
    "response.content_part.added": "part+",
    "response.content_part.done": "part!",
    "response.reasoning_text.delta": "reasoning~",
    "response.reasoning_text.done": "reasoning!",
    "response.output_text.delta": "message~",
    "response.output_text.done": "message!",
    "response.function_call_arguments.delta": "call~",
    "response.function_call_arguments.done": "call!",
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
_KINDS = {"message": "message", "reasoning": "reasoning", "function_call": "call"}


def bodies_of(events: Iterable[Any]) -> list[dict[str, Any]]:
    """The events that the client was sent, as they were."""
    return [event.to_dict() for event in events]


def parse_response(body: Any) -> Response:
    """Raises pydantic's ValidationError for what is none."""
    return Response.model_validate_json(json.dumps(body), strict=True)


def parse_item(body: Any) -> ResponseItem:
    """Of a list of input items."""
    return _ITEM.validate_json(json.dumps(body), strict=True)


def judge_events(bodies: Sequence[dict[str, Any]]) -> Response:
    """The events of a whole stream: each one OpenAI's, numbered without a gap, in order, and the pieces of each item
    what it is in the end. Returns the last response."""
    for body in bodies:
        _EVENT.validate_json(json.dumps(body), strict=True)
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    order = "".join(f"{_word(body)} " for body in bodies)
    assert _ORDER.fullmatch(order), order
    items: dict[int, Any] = {}
    pieces: dict[int, str] = {}
    for body in bodies:
        at: Any = body.get("output_index")
        if "item_id" in body:
            assert body["item_id"] == items[at]["id"]
        if "delta" in body:
            pieces[at] += body["delta"]
        elif body["type"] == "response.output_item.added":
            assert at == len(items)
            items[at], pieces[at] = body["item"], ""
        elif body["type"] == "response.output_item.done":
            assert body["item"].keys() == items[at].keys() and body["item"]["id"] == items[at]["id"]
            items[at] = body["item"]
            assert pieces[at] == _text_of(items[at])
    last = bodies[-1]["response"]
    assert last["output"] == list(items.values())
    return parse_response(last)


def _word(body: dict[str, Any]) -> str:
    if body["type"] in ("response.output_item.added", "response.output_item.done"):
        kind = _KINDS[body["item"]["type"]]
        return f"{kind}+" if body["type"].endswith("added") else f"{kind}item!"
    return _WORDS[body["type"]]


def _text_of(item: dict[str, Any]) -> str:
    text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
    assert isinstance(text, str)
    return text
