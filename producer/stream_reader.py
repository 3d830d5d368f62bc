"""Turns the entries of one job's stream into chunks. Handles order, gaps, resets and the end; does no I/O.

Published entries may come twice, late or not at all; the stream itself has each of them once, in order. The reader
drops the entries that it already has. When an entry does not follow the last one, the reader says so and its owner
reads the stream.

A Redis that lost writes after it published them (a fail-over) may have fewer entries than were delivered, or other ones
under the same ids. Usually the worker writes them again. Where it cannot, the stream does not continue what was
delivered: the reader then delivers a reset and reads the stream from its beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import ValidationError

from producer.contract import (
    Choice,
    Chunk,
    Done,
    EntryId,
    ErrorCode,
    ErrorInfo,
    Marker,
    Result,
    ToolCallDelta,
    merge_deltas,
    parse_entry,
    rest_of_calls,
)
from producer.contract.keys import DATA_FIELD, MARKER_FIELD
from producer.errors import JobFailedError

BEGINNING = EntryId(0, 0)
MAX_ENTRIES_A_READ = 1000

Entry = tuple[bytes, dict[bytes, bytes]]  # as XRANGE returns it


class Delivery(NamedTuple):
    """A chunk to hand out, the cursor behind it, and the reader's `generation`."""

    entry_id: EntryId
    chunk: Chunk
    generation: int = 0


@dataclass(slots=True)
class _Progress:
    """How much of one choice was delivered."""

    num_chars: int = 0
    num_reasoning_chars: int = 0
    num_tokens: int = 0
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    has_finished: bool = False

    def add(self, chunk: Chunk) -> None:
        self.num_chars += len(chunk.text)
        self.num_reasoning_chars += len(chunk.reasoning or "")
        self.num_tokens += len(chunk.token_ids)
        if chunk.tool_calls:
            self.tool_calls = merge_deltas([*self.tool_calls, *chunk.tool_calls])
        self.has_finished = chunk.finish_reason is not None


@dataclass(slots=True)
class StreamReader:
    """`last_id` is the last entry read; `done` is the entry that ended the stream, once it was read. `generation` is
    the attempt in which the job last started over, which voids all earlier chunks: 0 if it never did. All readers that
    begin at the start of a stream have the same generation."""

    job_id: str
    last_id: EntryId = BEGINNING
    done: Done | None = None
    generation: int = 0
    must_read_on: bool = False
    """Whether the last range was not the whole rest of the stream."""
    _progress: dict[int, _Progress] = field(default_factory=dict)
    _is_reading_again: bool = False  # from the beginning, after a loss
    _has_taken: bool = False  # anything that a reset would void
    _knows_all: bool = field(init=False)  # whether `_progress` counts everything that was ever delivered
    _has_shown: bool = field(init=False)

    def __post_init__(self) -> None:
        self._knows_all = self.last_id == BEGINNING
        self._has_shown = not self._knows_all

    def take_published(self, payload: bytes) -> list[Delivery] | None:
        """Take a published `<entry id> <json>`. None: it does not follow the last entry, so the stream must be read
        from `last_id`."""
        try:
            id_text, _, data = payload.partition(b" ")
            entry_id, entry = EntryId.parse(id_text), parse_entry(data)
        except (ValueError, ValidationError):
            return None  # not written by a worker; reading the stream shows what is true
        if entry_id <= self.last_id:
            return []
        if not entry_id.follows(self.last_id) or not self._goes_on(entry):
            return None
        return self._take(entry_id, entry)

    def take_range(self, entries: Sequence[Entry]) -> list[Delivery]:
        """Take entries read from the stream in order, at most MAX_ENTRIES_A_READ, including the one at `last_id`.

        Raises JobFailedError for an entry that cannot be parsed: from a newer contract, or not written by a worker.
        """
        try:
            return self._take_entries(entries)
        except ValidationError as error:
            message = f"what its stream holds cannot be read: {error.errors(include_url=False)[0]['msg']}"
            raise JobFailedError(self.job_id, ErrorInfo(code=ErrorCode.RESULT_STORE_ERROR, message=message)) from error

    def _take_entries(self, entries: Sequence[Entry]) -> list[Delivery]:
        self.must_read_on = len(entries) == MAX_ENTRIES_A_READ
        had_shown = self._has_shown
        if entries and self.last_id not in (BEGINNING, EntryId.parse(entries[0][0])):
            return self._start_over(had_shown)
        deliveries: list[Delivery] = []
        for raw_id, fields in entries:
            entry_id = EntryId.parse(raw_id)
            if entry_id <= self.last_id:
                continue
            if MARKER_FIELD.encode() in fields:
                if Marker.model_validate_json(fields[MARKER_FIELD.encode()]).reset:
                    self._void()
                    self.generation = entry_id.attempt if self._has_taken else self.generation
                    deliveries = [self._reset_at(entry_id)] if had_shown else []
                self.last_id = entry_id
            elif DATA_FIELD.encode() in fields:
                entry = parse_entry(fields[DATA_FIELD.encode()])
                if not (self._goes_on(entry) or self._is_reading_again):
                    return self._start_over(had_shown)
                deliveries += self._take(entry_id, entry)
        self._is_reading_again = self._is_reading_again and self.must_read_on
        return deliveries

    def take_result(self, result: Result) -> list[Delivery]:
        """Take the result in place of a stream that has expired, or that Redis lost before the job ended again: returns
        what the result holds beyond what was delivered, one chunk per choice."""
        deliveries: list[Delivery] = []
        if not self._knows_all or self._has_shown_more_than(result):
            self._void()
            deliveries.append(self._reset_at(self.last_id))
        for choice in result.choices:
            chunk = self._rest_of(choice, result)
            if chunk is not None:
                deliveries.append(Delivery(self.last_id, chunk, self.generation))
        return deliveries

    def _goes_on(self, entry: Chunk | Done) -> bool:
        """Whether the entry can follow what was delivered so far."""
        if not self._knows_all or self.done is not None:
            return True
        if isinstance(entry, Done):
            return entry.usage.completion_tokens == sum(progress.num_tokens for progress in self._progress.values())
        progress = self._progress.get(entry.index)
        return entry.token_offset == (0 if progress is None else progress.num_tokens)

    def _has_shown_more_than(self, result: Result) -> bool:
        return any(
            self._progress[choice.index].num_tokens > len(choice.token_ids)
            for choice in result.choices
            if choice.index in self._progress
        )

    def _start_over(self, had_shown: bool) -> list[Delivery]:
        """Start over: the stream is not the one that was delivered."""
        self._void()
        self.generation, self._has_taken = 0, False
        self.last_id = BEGINNING
        self.must_read_on = self._is_reading_again = True
        return [self._reset_at(BEGINNING)] if had_shown else []

    def _take(self, entry_id: EntryId, entry: Chunk | Done) -> list[Delivery]:
        self.last_id = entry_id
        self._has_taken = True
        if self.done is not None:
            return []  # only a reset opens a stream that has ended
        if isinstance(entry, Done):
            self.done = entry
            return []
        if (progress := self._progress.get(entry.index)) is None:
            progress = self._progress[entry.index] = _Progress()
        progress.add(entry)
        self._has_shown = True
        return [Delivery(entry_id, entry, self.generation)]

    def _void(self) -> None:
        """Void all earlier chunks: those not delivered yet never are, and those delivered are taken back by a reset."""
        self._progress.clear()
        self.done = None
        self._knows_all = True
        self._has_shown = False

    def _reset_at(self, entry_id: EntryId) -> Delivery:
        return Delivery(entry_id, Chunk(job_id=self.job_id, reset=True), self.generation)

    def _rest_of(self, choice: Choice, result: Result) -> Chunk | None:
        is_first = choice.index == 0 and 0 not in self._progress
        progress = self._progress.setdefault(choice.index, _Progress())
        if progress.has_finished:
            return None
        return Chunk(
            job_id=self.job_id,
            index=choice.index,
            token_offset=progress.num_tokens,
            text=choice.text[progress.num_chars :],
            token_ids=choice.token_ids[progress.num_tokens :],
            logprobs=choice.logprobs[progress.num_tokens :] if choice.logprobs is not None else None,
            prompt=result.prompt if is_first else None,
            tool_calls=rest_of_calls(choice.tool_calls or [], progress.tool_calls) or None,
            reasoning=(choice.reasoning or "")[progress.num_reasoning_chars :] or None,
            finish_reason=choice.finish_reason,
        )
