"""One job's chunks as OpenAI's stream events, ready to send. Pure: no connection, no clock.

The cursor stands inside the JSON, `"promptmill": {"job_id": …, "cursor": …}`, in the last event that an entry makes, so
that a client that resumes there has seen everything before.
"""

from collections.abc import Sequence
from typing import Any

from producer.contract import Chunk, TokenLogprob, Usage
from producer.gateway.job_records import JobRecord
from producer.gateway.renderer import DONE, Renderer, to_json
from producer.openai.logprobs import chat_logprobs, completion_logprobs
from producer.openai.request import CHAT_URL
from producer.openai.response import finish_reason_body, first_token_text, usage_body

_NO_ANSWERS_END = ("cancelled", "error")  # followed by an error event, not by a finish reason


class ChunkRenderer(Renderer):
    """`is_resumed`: the client has seen the beginning."""

    def __init__(self, job_id: str, record: JobRecord, *, includes_usage: bool, is_resumed: bool = False) -> None:
        self._job_id = job_id
        self._record = record
        self._is_chat = record.url == CHAT_URL
        self._has_role = is_resumed
        self._begun: set[int] = set()
        self._num_chars: dict[int, int] = {}  # of each choice, for the offsets of a completion's logprobs
        self._head = self._build_head()
        self._includes_usage = includes_usage
        self._usage = ',"usage":null' if includes_usage else ""

    def render(self, chunk: Chunk, cursor: str) -> list[bytes]:
        choices = list(self._chat_choices(chunk) if self._is_chat else self._completion_choices(chunk))
        last = len(choices) - 1
        return [self._event([choice], cursor if at == last else None) for at, choice in enumerate(choices)]

    def render_reset(self, cursor: str) -> bytes:
        self._begun.clear()
        self._num_chars.clear()
        self._has_role = False
        return self._event([], cursor, reset=True)

    def render_end(self, usage: Usage) -> bytes:
        """With `stream_options.include_usage`, one more event."""
        if not self._includes_usage:
            return DONE
        return f'{self._head}"choices":[],"usage":{to_json(usage_body(usage))}}}\n\n'.encode() + DONE

    def _build_head(self) -> str:
        common = {
            "id": self._record.response_id,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": self._record.created,
            "model": self._record.model,
        }
        return f"data: {to_json(common)[:-1]},"

    def _event(self, choices: list[dict[str, Any]], cursor: str | None, *, reset: bool = False) -> bytes:
        ours: dict[str, Any] = {"job_id": self._job_id}
        if cursor is not None:
            ours["cursor"] = cursor
        if reset:
            ours["reset"] = True
        return f'{self._head}"choices":{to_json(choices)}{self._usage},"promptmill":{to_json(ours)}}}\n\n'.encode()

    def _chat_choices(self, chunk: Chunk) -> list[dict[str, Any]]:
        choices = []
        if not self._has_role and chunk.index not in self._begun:
            self._begun.add(chunk.index)
            choices.append(self._choice(chunk.index, delta={"role": "assistant", "content": ""}))
        delta: dict[str, Any] = {}
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.text or chunk.logprobs:
            delta["content"] = chunk.text
        if chunk.tool_calls:
            delta["tool_calls"] = chunk.tool_calls
        if delta:
            logprobs = chat_logprobs(chunk.logprobs) if chunk.logprobs else None
            choices.append(self._choice(chunk.index, delta=delta, logprobs=logprobs))
        reason = self._finish_reason(chunk)
        if reason is not None:
            choices.append(self._choice(chunk.index, delta={}, finish_reason=reason))
        return choices

    def _completion_choices(self, chunk: Chunk) -> list[dict[str, Any]]:
        choices = []
        if chunk.prompt is not None:  # shown before every choice
            prompt, first_text = chunk.prompt, first_token_text(chunk.prompt)
            choices = [
                self._text_choice(index, prompt.text, prompt.logprobs, None, first_text)
                for index in range(self._record.num_choices)
            ]
        reason = self._finish_reason(chunk)
        if chunk.text or chunk.logprobs or reason is not None:
            choices.append(self._text_choice(chunk.index, chunk.text, chunk.logprobs, reason))
        return choices

    def _text_choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob | None] | None,
        reason: str | None,
        first_text: str = "",
    ) -> dict[str, Any]:
        logprobs = None
        if tokens:
            offset = self._num_chars.get(index, 0)
            logprobs = completion_logprobs(tokens, text_offset=offset, first_text=first_text)
            self._num_chars[index] = offset + sum(len(token_text) for token_text in logprobs["tokens"])
        return self._choice(index, text=text, logprobs=logprobs, finish_reason=reason)

    def _choice(
        self, index: int, *, logprobs: Any = None, finish_reason: str | None = None, **content: Any
    ) -> dict[str, Any]:
        place = self._record.first_index + index
        return {"index": place, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _finish_reason(self, chunk: Chunk) -> str | None:
        reason = chunk.finish_reason
        return None if reason is None or reason in _NO_ANSWERS_END else finish_reason_body(reason)
