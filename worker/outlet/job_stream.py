"""What one attempt at one job has put out. Knows the contract's entries; knows nothing of Redis.

Tokens are buffered until a flush encodes them, one entry a choice. An encoded entry never changes: its id is
`<attempt>-<its place in the list>`, so that it can be sent again, and the list is kept until the job is committed.
"""

from dataclasses import dataclass, field

from engine.outputs import RequestOutput
from producer.contract import (
    Choice,
    Chunk,
    Done,
    EntryId,
    FinishReason,
    Marker,
    ToolCallDelta,
    Usage,
    join_deltas,
    merge_deltas,
)
from producer.contract.keys import DATA_FIELD, MARKER_FIELD
from worker.parsing.parsed_text import ParsedText

MAX_ENTRIES_PER_APPEND = 1000  # bounds one script run when a whole stream is sent again


@dataclass(slots=True)
class _ChoiceOutput:
    """All output of one choice, and how much of it stands in entries already."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_encoded_texts: int = 0
    num_encoded_reasonings: int = 0
    num_encoded_deltas: int = 0
    num_encoded_tokens: int = 0
    is_finish_encoded: bool = False

    def take(self, parsed: ParsedText) -> None:
        if parsed.text:
            self.text.append(parsed.text)
        if parsed.reasoning:
            self.reasoning.append(parsed.reasoning)
        self.tool_calls += parsed.tool_calls

    def mark_encoded(self) -> None:
        """All of it stands in entries."""
        self.num_encoded_tokens = len(self.token_ids)
        self.num_encoded_texts = len(self.text)
        self.num_encoded_reasonings = len(self.reasoning)
        self.num_encoded_deltas = len(self.tool_calls)
        self.is_finish_encoded = self.finish_reason is not None

    @property
    def is_pending(self) -> bool:
        return (
            self.num_encoded_tokens < len(self.token_ids)
            or self.num_encoded_texts < len(self.text)
            or self.num_encoded_reasonings < len(self.reasoning)
            or self.num_encoded_deltas < len(self.tool_calls)
            or (self.finish_reason is not None and not self.is_finish_encoded)
        )


class JobStream:
    """Turns `RequestOutput`s into stream entries and, at the end, into the result's choices and usage."""

    def __init__(
        self, job_id: str, attempt: int, *, publish: bool, num_prompt_tokens: int = 0, num_choices: int = 1
    ) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self.publish = publish
        self.num_prompt_tokens = num_prompt_tokens
        self._choices = [_ChoiceOutput() for _ in range(num_choices)]
        self._entries: list[str] = []  # entry i has the id `<attempt>-<i>`; entry 0 is the marker
        self._num_stored = 0
        self._num_sent = 0
        self._num_cached_tokens = 0
        self._has_pending = False
        self._is_sealed = False

    def add(self, output: RequestOutput, parsed: ParsedText | None = None) -> None:
        """Buffer what one choice was given; `parsed`: what its text is, where that is not content alone.

        Ignored once the stream is sealed: its outcome is decided.
        """
        if self._is_sealed:
            return
        choice = self._choices[output.index]
        assert output.token_offset == len(choice.token_ids), "the engine left out or repeated tokens"
        choice.token_ids.extend(output.token_ids)
        choice.take(ParsedText(output.text) if parsed is None else parsed)
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        self._has_pending = self._has_pending or choice.is_pending

    def mark(self, marker: Marker) -> None:
        """Make `marker` the attempt's first entry."""
        assert not self._entries, "a stream has one marker, before everything else"
        self._entries.append(marker.to_wire())

    def end_choices(self, reason: FinishReason) -> None:
        """Give every choice that has not ended `reason` as its end."""
        for choice in self._choices:
            if choice.finish_reason is None:
                choice.finish_reason = reason
                self._has_pending = True

    def seal(self, done: Done) -> None:
        """Encode what is buffered, then `done`: nothing can follow."""
        assert not self._is_sealed, "a stream has one done entry"
        self.encode_pending()
        self._entries.append(done.to_wire())
        self._is_sealed = True

    def encode_pending(self) -> None:
        """Turn what is buffered into entries, one a choice."""
        if not self._has_pending:
            return
        for index, choice in enumerate(self._choices):
            if choice.is_pending:
                self._entries.append(self._encode(index, choice))
        self._has_pending = False

    def unsent(self) -> tuple[EntryId | None, list[str], bool]:
        """What to append next: the id it follows (None for the marker), the entries, and whether the last is `done`.

        Entries are flat: id, field, JSON, and so on. Their number is bounded; the rest is for the next call.
        """
        first = self._num_stored
        entries = self._entries[first : first + MAX_ENTRIES_PER_APPEND]
        self._num_sent = first + len(entries)
        flat: list[str] = []
        for seq, entry in enumerate(entries, first):
            flat += (f"{self.attempt}-{seq}", DATA_FIELD if seq else MARKER_FIELD, entry)
        expected = EntryId(self.attempt, first - 1) if first else None
        return expected, flat, self._is_sealed and self._num_sent == len(self._entries)

    def acknowledge_sent(self) -> None:
        """What the last call of `unsent` returned is stored."""
        self._num_stored = self._num_sent

    def acknowledge(self, stored: EntryId | None) -> bool:
        """Nothing was appended, because the stored stream ends with `stored`. False: this attempt is fenced out."""
        if stored is None or stored.attempt < self.attempt:
            self._num_stored = 0  # Redis lost what it had acknowledged: all is sent again, from the marker on
            return True
        self._num_stored = stored.seq + 1
        return stored.attempt == self.attempt and self._num_stored <= len(self._entries)

    @property
    def has_unsent(self) -> bool:
        return self._has_pending or self._num_stored < len(self._entries)

    @property
    def is_sealed(self) -> bool:
        return self._is_sealed

    @property
    def is_stored(self) -> bool:
        """Whether Redis has everything, the done entry included: the job may be committed."""
        return self._is_sealed and self._num_stored == len(self._entries)

    @property
    def num_unsent_bytes(self) -> int:
        """Roughly what the part that is not stored takes in memory."""
        encoded = sum(len(entry) for entry in self._entries[self._num_stored :])
        pending = sum(
            8 * (len(choice.token_ids) - choice.num_encoded_tokens)
            + sum(len(text) for text in choice.text[choice.num_encoded_texts :])
            + sum(len(text) for text in choice.reasoning[choice.num_encoded_reasonings :])
            + sum(len(delta["function"]["arguments"]) for delta in choice.tool_calls[choice.num_encoded_deltas :])
            for choice in self._choices
        )
        return encoded + pending

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    @property
    def usage(self) -> Usage:
        num_output = self.num_output_tokens
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_output,
            total_tokens=self.num_prompt_tokens + num_output,
            cached_tokens=self._num_cached_tokens,
        )

    def choices(self) -> list[Choice]:
        """The result's choices: exactly what joining the entries gives. Every choice must have ended."""
        return [_as_choice(index, choice) for index, choice in enumerate(self._choices)]

    def _encode(self, index: int, choice: _ChoiceOutput) -> str:
        chunk = Chunk(
            job_id=self.job_id,
            index=index,
            token_offset=choice.num_encoded_tokens,
            text="".join(choice.text[choice.num_encoded_texts :]),
            token_ids=choice.token_ids[choice.num_encoded_tokens :],
            tool_calls=merge_deltas(choice.tool_calls[choice.num_encoded_deltas :]) or None,
            reasoning="".join(choice.reasoning[choice.num_encoded_reasonings :]) or None,
            finish_reason=None if choice.is_finish_encoded else choice.finish_reason,
        )
        choice.mark_encoded()
        return chunk.to_wire()


def _as_choice(index: int, choice: _ChoiceOutput) -> Choice:
    assert choice.finish_reason is not None, "end_choices() comes before choices()"
    return Choice(
        index=index,
        text="".join(choice.text),
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        tool_calls=join_deltas(choice.tool_calls),
        reasoning="".join(choice.reasoning) or None,
    )
