"""What a response puts out: items, made of its job's chunks, and the events that tell of each step. Pure.

The same for a stream, chunk by chunk, and for a result, which is one. Items stand in the order in which they began; of
text among calls a result no longer knows where it stood, and has it before them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from producer.contract import Choice, Chunk, FinishReason, ToolCallDelta, rest_of_calls
from producer.openai.logprobs import chat_logprobs

Event = dict[str, Any]  # without its sequence_number

_NAMES = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


@dataclass(slots=True)
class _OpenItem:
    kind: str
    index: int
    item: dict[str, Any]  # as it was added, without content
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        content = {} if self.kind == "function_call" else {"content_index": 0}
        return {"item_id": self.item["id"], "output_index": self.index, **content}

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}
        return {"type": "reasoning_text", "text": text}


class ResponseOutput:
    """`items` are those that are whole."""

    def __init__(self, job_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: FinishReason | None = None
        self._job_id = job_id
        self._open: _OpenItem | None = None
        self._kinds: list[str] = []  # of all items
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still to come

    @classmethod
    def of_choice(cls, job_id: str, choice: Choice) -> "ResponseOutput":
        """Of a job that has ended."""
        output = cls(job_id)
        chunk = Chunk(
            job_id=job_id,
            text=choice.text,
            logprobs=choice.logprobs,
            tool_calls=rest_of_calls(choice.tool_calls or [], []),
            reasoning=choice.reasoning,
            finish_reason=choice.finish_reason,
        )
        for _ in (*output.take(chunk), *output.end()):
            pass
        return output

    @property
    def is_whole(self) -> bool:
        return self.finish_reason in ("stop", "tool_calls")

    def take(self, chunk: Chunk) -> Iterator[Event]:
        """The events of a chunk."""
        if chunk.reasoning:
            yield from self._add_text("reasoning", chunk.reasoning)
        if chunk.logprobs:
            self._logprobs += chat_logprobs(chunk.logprobs)["content"]
        if chunk.text:
            yield from self._add_text("message", chunk.text)
        for delta in chunk.tool_calls or ():
            yield from self._add_call(delta)
        self.finish_reason = chunk.finish_reason or self.finish_reason

    def end(self) -> Iterator[Event]:
        """Behind the last chunk. An answer without a word is an empty message."""
        is_answered = "message" in self._kinds or "function_call" in self._kinds
        if not is_answered and (self.is_whole or (not self._kinds and self.finish_reason in ("length", "deadline"))):
            yield from self._begin_text("message")
        yield from self._close("completed" if self.is_whole else "incomplete")

    def _add_text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin_text(kind)
        assert self._open is not None
        logprobs = {}
        if kind == "message":
            logprobs = {"logprobs": self._logprobs}
            self._open.logprobs += self._logprobs
            self._logprobs = []
        self._open.pieces.append(text)
        yield {"type": f"{_NAMES[kind]}.delta", **self._open.place, "delta": text, **logprobs}

    def _begin_text(self, kind: str) -> Iterator[Event]:
        own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        prefix, number = ("msg" if kind == "message" else "rs"), self._kinds.count(kind)
        item = {"id": f"{prefix}_{self._job_id}" + (f"_{number}" if number else ""), "type": kind, **own}
        yield from self._begin(item, {"content": []})
        assert self._open is not None
        yield {"type": "response.content_part.added", **self._open.place, "part": self._open.part("")}

    def _add_call(self, delta: ToolCallDelta) -> Iterator[Event]:
        function = delta["function"]
        if "id" in delta:
            number = self._kinds.count("function_call")
            item = {"id": f"fc_{self._job_id}_{number}", "type": "function_call", "call_id": delta["id"]}
            yield from self._begin({**item, "name": function.get("name", "")}, {"arguments": ""})
        if self._open is None or self._open.kind != "function_call":
            return  # of a call that text has ended: a parser never gives one
        if function["arguments"]:
            self._open.pieces.append(function["arguments"])
            yield {"type": f"{_NAMES['function_call']}.delta", **self._open.place, "delta": function["arguments"]}

    def _begin(self, item: dict[str, Any], empty: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = _OpenItem(item["type"], len(self.items), item)
        self._kinds.append(item["type"])
        added = {**item, **empty, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._open.index, "item": added}

    def _close(self, status: str) -> Iterator[Event]:
        if (opened := self._open) is None:
            return
        self._open = None
        text, name = "".join(opened.pieces), _NAMES[opened.kind]
        if opened.kind == "function_call":
            content: dict[str, Any] = {"arguments": text}
            yield {"type": f"{name}.done", **opened.place, "name": opened.item["name"], "arguments": text}
        else:
            if opened.kind == "message":
                opened.logprobs += self._logprobs
                self._logprobs = []
            part = opened.part(text)
            logprobs = {"logprobs": opened.logprobs} if opened.kind == "message" else {}
            content = {"content": [part]}
            yield {"type": f"{name}.done", **opened.place, "text": text, **logprobs}
            yield {"type": "response.content_part.done", **opened.place, "part": part}
        item = {**opened.item, **content, "status": status}
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": opened.index, "item": item}
