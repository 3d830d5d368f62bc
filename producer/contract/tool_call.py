"""Calls a model makes, on the wire: whole in a result, in pieces on a stream. The shapes are OpenAI's."""

from collections.abc import Iterable, Sequence
from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class CalledFunction(TypedDict):
    name: str
    arguments: str  # JSON text as the model wrote it; a call that was cut off has its beginning


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first piece of a call has all fields, the later ones `index` and more of the arguments."""

    index: int  # of the call, among its choice's
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


def merge_deltas(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """The same in one piece for each call, in order."""
    merged: dict[int, ToolCallDelta] = {}
    fragments: dict[int, list[str]] = {}
    for delta in deltas:
        merged.setdefault(delta["index"], delta)
        fragments.setdefault(delta["index"], []).append(delta["function"]["arguments"])
    return [
        cast(ToolCallDelta, {**first, "function": {**first["function"], "arguments": "".join(fragments[index])}})
        for index, first in sorted(merged.items())
    ]


def join_deltas(deltas: Iterable[ToolCallDelta]) -> list[ToolCall] | None:
    """The calls that all pieces of a choice make; None if there are none, as a result has it."""
    calls = [
        cast(ToolCall, {name: value for name, value in delta.items() if name != "index"})
        for delta in merge_deltas(deltas)
    ]
    return calls or None


def rest_of_calls(calls: Sequence[ToolCall], shown: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """What is left of `calls` for one who has seen the pieces `shown`."""
    seen = {delta["index"]: len(delta["function"]["arguments"]) for delta in merge_deltas(shown)}
    rest: list[ToolCallDelta] = []
    for index, call in enumerate(calls):
        if index not in seen:
            rest.append(cast(ToolCallDelta, {"index": index, **call}))
        elif arguments := call["function"]["arguments"][seen[index] :]:
            rest.append({"index": index, "function": {"arguments": arguments}})
    return rest
