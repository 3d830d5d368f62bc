"""The rules of reading a stream, without a Redis: any mix of lost, late and repeated messages gives each chunk once."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Usage,
    parse_entry,
)
from producer.contract.keys import DATA_FIELD, MARKER_FIELD
from producer.errors import JobFailedError
from producer.stream_reader import BEGINNING, Delivery, Entry, StreamReader


def chunk(text: str, index: int = 0, offset: int = 0) -> Chunk:
    """A token a character; `offset` tokens of the choice come before."""
    token_ids = [ord(character) for character in text]
    return Chunk(job_id="j", index=index, text=text, token_ids=token_ids, token_offset=offset)


def done(num_tokens: int = 0) -> Done:
    return Done(job_id="j", done=True, status="finished", usage=Usage(completion_tokens=num_tokens))


def data(entry_id: EntryId, entry: Chunk | Done) -> Entry:
    return str(entry_id).encode(), {DATA_FIELD.encode(): entry.to_wire().encode()}


def marker(attempt: int, *, reset: bool = False) -> Entry:
    wire = Marker(job_id="j", attempt=attempt, worker="w", reset=reset).to_wire()
    return f"{attempt}-0".encode(), {MARKER_FIELD.encode(): wire.encode()}


def published(entry: Entry) -> bytes:
    return entry[0] + b" " + entry[1][DATA_FIELD.encode()]


def test_what_follows_is_taken_and_what_is_known_is_dropped() -> None:
    reader = StreamReader("j")
    reader.take_range([marker(1)])
    first = data(EntryId(1, 1), chunk("a"))
    assert [delivery.chunk.text for delivery in reader.take_published(published(first)) or []] == ["a"]
    assert reader.take_published(published(first)) == []
    assert reader.last_id == EntryId(1, 1)


def test_a_gap_and_a_message_of_a_stranger_ask_for_the_stream() -> None:
    reader = StreamReader("j")
    assert reader.take_published(published(data(EntryId(1, 2), chunk("b")))) is None
    assert reader.take_published(b"hello") is None
    assert reader.take_published(b"1-1 {}") is None
    assert reader.last_id == EntryId(0, 0)
    reader.take_range([marker(1)])
    for entry_id in (EntryId(1, 2), EntryId(2, 1)):
        assert reader.take_published(published(data(entry_id, chunk("b")))) is None
    assert reader.last_id == EntryId(1, 0)


def test_entries_behind_the_end_count_only_after_a_reset() -> None:
    reader = StreamReader("j")
    entries = [
        marker(1),
        data(EntryId(1, 1), chunk("old")),
        data(EntryId(1, 2), done(num_tokens=3)),
        data(EntryId(1, 3), chunk("ghost")),
    ]
    assert [delivery.chunk.text for delivery in reader.take_range(entries)] == ["old"]
    assert reader.done is not None
    again = reader.take_range([entries[-1], marker(2, reset=True), data(EntryId(2, 1), chunk("new"))])
    assert [(delivery.chunk.reset, delivery.chunk.text) for delivery in again] == [(True, ""), (False, "new")]
    assert reader.done is None


def test_an_end_that_cannot_be_read_is_no_chunk_and_says_so() -> None:
    """Of a newer contract."""
    reader, key = StreamReader("job"), DATA_FIELD.encode()
    newer = data(EntryId(1, 1), done())[1][key].replace(b'"finished"', b'"postponed"')
    assert b"postponed" in newer
    with pytest.raises(JobFailedError, match="what its stream holds cannot be read") as caught:
        reader.take_range([marker(1), (b"1-1", {key: newer})])
    assert caught.value.error.code is ErrorCode.RESULT_STORE_ERROR
    assert isinstance(parse_entry(chunk('"done":true').to_wire()), Chunk)
    assert isinstance(parse_entry(chunk("done").to_wire()), Chunk)


def test_what_a_newer_worker_adds_to_an_error_is_passed_over() -> None:
    error = ErrorInfo(code=ErrorCode.INTERNAL, message="why")
    wire = Done(job_id="job", done=True, status="failed", error=error).to_wire()
    assert parse_entry(wire.replace('"message"', '"hint":1,"message"')) == parse_entry(wire)


def test_a_reset_before_anything_was_shown_is_not_told() -> None:
    entries = [marker(1), data(EntryId(1, 1), chunk("old")), marker(2, reset=True), data(EntryId(2, 1), chunk("new"))]
    assert [delivery.chunk.text for delivery in StreamReader("j").take_range(entries)] == ["new"]
    resumed = StreamReader("j", EntryId(1, 1)).take_range(entries[1:])
    assert [(delivery.chunk.reset, str(delivery.entry_id)) for delivery in resumed] == [(True, "2-0"), (False, "2-1")]


def test_a_job_has_begun_anew_where_a_reset_made_anything_void() -> None:
    def last_generation(*entries: Entry) -> int:
        reader = StreamReader("j")
        [*_, delivery] = reader.take_range([*entries, marker(4), data(EntryId(4, 1), chunk("new"))])
        assert delivery.generation == reader.generation
        return delivery.generation

    old, end = data(EntryId(1, 1), chunk("old")), data(EntryId(1, 1), done())
    assert last_generation(marker(1)) == last_generation(marker(1), marker(2, reset=True)) == 0
    assert last_generation(marker(1), old, marker(2, reset=True), marker(3)) == 2
    assert last_generation(marker(1), end, marker(2, reset=True), marker(3, reset=True)) == 3


def test_the_result_gives_what_is_missing_of_each_choice() -> None:
    reader = StreamReader("j")
    reader.take_range([marker(1), data(EntryId(1, 1), chunk("ab"))])
    choices = [
        Choice(index=0, text="abcd", token_ids=[1, 2, 3, 4], finish_reason="stop"),
        Choice(index=1, text="x", token_ids=[9], finish_reason="length"),
    ]
    rest = [delivery.chunk for delivery in reader.take_result(Result(job_id="j", status="finished", choices=choices))]
    assert [(chunk.index, chunk.text, chunk.token_ids, chunk.token_offset) for chunk in rest] == [
        (0, "cd", [3, 4], 2),
        (1, "x", [9], 0),
    ]


@st.composite
def histories(draw: st.DrawFn, num_choices: int = 2) -> list[Entry]:
    """A stream of one to three attempts, some of which start over, and its end."""
    return go_on(draw, [], draw(st.integers(1, 3)), num_choices)


def go_on(
    draw: Callable[[st.SearchStrategy[int]], int],
    entries: list[Entry],
    num_attempts: int,
    num_choices: int = 1,
    *,
    has_marker: bool = False,
) -> list[Entry]:
    """`entries`, and further attempts to the end; with `has_marker` the first of them has begun."""
    entries = list(entries)
    first = EntryId.parse(entries[-1][0]) if entries else EntryId(0, 0)
    num_tokens = held_tokens(entries)
    seq = first.seq if has_marker else 0
    for attempt in range(first.attempt + (not has_marker), first.attempt + (not has_marker) + num_attempts):
        if not (has_marker and attempt == first.attempt):
            seq, reset = 0, attempt > 1 and bool(draw(st.booleans()))
            entries.append(marker(attempt, reset=reset))
            num_tokens = Counter() if reset else num_tokens
        for _ in range(draw(st.integers(0, 6))):
            seq, index = seq + 1, draw(st.integers(0, num_choices - 1))
            text = "".join(token_text(index, num_tokens[index] + at) for at in range(draw(st.integers(1, 3))))
            entries.append(data(EntryId(attempt, seq), chunk(text, index, num_tokens[index])))
            num_tokens[index] += len(text)
    entries.append(data(EntryId(attempt, seq + 1), done(num_tokens.total())))
    return entries


def token_text(index: int, at: int) -> str:
    """What the engine says there, in every attempt."""
    return "abcdefghijklmnopqrstuvwxyz"[(at + 13 * index) % 26]


def held_tokens(history: list[Entry]) -> Counter[int]:
    return Counter({index: len(text) for index, text in shown_text(history).items()})


def shown_text(history: list[Entry]) -> dict[int, str]:
    """What the contract says a reader holds in the end."""
    texts: dict[int, str] = {}
    for _, fields in history:
        if MARKER_FIELD.encode() in fields:
            if Marker.model_validate_json(fields[MARKER_FIELD.encode()]).reset:
                texts.clear()
            continue
        entry = parse_entry(fields[DATA_FIELD.encode()])
        if isinstance(entry, Chunk) and entry.text:
            texts[entry.index] = texts.get(entry.index, "") + entry.text
    return texts


def generation_of(history: list[Entry]) -> int:
    """Where the contract says that it last began anew."""
    generation, has_data = 0, False
    for raw_id, fields in history:
        has_data = has_data or DATA_FIELD.encode() in fields
        if MARKER_FIELD.encode() in fields and Marker.model_validate_json(fields[MARKER_FIELD.encode()]).reset:
            generation = EntryId.parse(raw_id).attempt if has_data else generation
    return generation


class Consumer:
    """A reader, and what it has shown."""

    def __init__(self) -> None:
        self.reader = StreamReader("j")
        self.held: dict[int, str] = {}

    def follow(self, history: list[Entry], choices: st.DataObject, num_stored: int) -> None:
        """Hear of entries as they are stored, at random, to where `num_stored` of them are."""
        seen = 0
        while seen < num_stored:
            seen = min(num_stored, seen + choices.draw(st.integers(1, 4)))
            visible = [entry for entry in history[:seen] if DATA_FIELD.encode() in entry[1]]
            is_heard = choices.draw(st.booleans())
            if visible and is_heard:
                deliveries = self.reader.take_published(published(choices.draw(st.sampled_from(visible))))
                if deliveries is None:
                    self.read(history[:seen])
                else:
                    self._hold(deliveries)

    def read(self, stored: list[Entry]) -> None:
        self.reader.must_read_on = True
        while self.reader.must_read_on:
            rest = [entry for entry in stored if EntryId.parse(entry[0]) >= self.reader.last_id]
            self._hold(self.reader.take_range(rest))

    def _hold(self, deliveries: list[Delivery]) -> None:
        for _, delivered, _ in deliveries:
            if delivered.reset:
                self.held.clear()
            elif delivered.text:
                self.held[delivered.index] = self.held.get(delivered.index, "") + delivered.text


@given(histories(), st.data())
def test_whatever_is_lost_late_or_repeated_each_chunk_is_shown_once_in_order(
    history: list[Entry], choices: st.DataObject
) -> None:
    consumer = Consumer()
    consumer.follow(history, choices, len(history))
    consumer.read(history)
    assert consumer.reader.done is not None
    assert consumer.held == shown_text(history)
    assert consumer.reader.generation == generation_of(history)


@given(histories(num_choices=1), st.data(), st.booleans())
def test_whatever_a_redis_lost_that_was_shown_already_the_reader_ends_with_what_the_stream_says(
    history: list[Entry], choices: st.DataObject, is_same_attempt: bool
) -> None:
    """A fail-over: the stream is cut back, and goes on as another attempt, or as the same one with other entries."""
    consumer = Consumer()
    consumer.follow(history, choices, choices.draw(st.integers(0, len(history) - 1)))
    num_kept = choices.draw(st.integers(1, len(history) - 1))
    other = go_on(choices.draw, history[:num_kept], 1, has_marker=is_same_attempt)
    consumer.follow(other, choices, len(other))
    consumer.read(other)
    if consumer.reader.done is None:  # it has seen more entries than there are: the result says the rest
        assert consumer.reader.last_id >= EntryId.parse(other[-1][0])
    else:
        assert consumer.held == shown_text(other)


def test_a_cursor_whose_entry_was_lost_begins_anew() -> None:
    entries = [marker(1), data(EntryId(1, 1), chunk("a")), marker(2), data(EntryId(2, 1), chunk("b", offset=1))]
    reader = StreamReader("j", EntryId(1, 2))
    [reset] = reader.take_range(entries[2:])
    assert reset.chunk.reset and reset.entry_id == BEGINNING and reader.must_read_on
    assert [delivery.chunk.text for delivery in reader.take_range(entries)] == ["a", "b"]


def test_who_saw_more_than_the_result_holds_is_told_that_it_is_void() -> None:
    """As behind a fail-over that lost the stream, if the job came to an earlier end then."""
    reader = StreamReader("j")
    reader.take_range([marker(1), data(EntryId(1, 1), chunk("ab")), data(EntryId(1, 2), chunk("cd", offset=2))])
    assert reader.take_range([]) == []  # of the new stream, which is shorter
    choices = [Choice(index=0, text="a", token_ids=[97], finish_reason="cancelled")]
    told = [delivery.chunk for delivery in reader.take_result(Result(job_id="j", status="cancelled", choices=choices))]
    assert [(chunk.reset, chunk.text, chunk.token_offset) for chunk in told] == [(True, "", 0), (False, "a", 0)]


def test_an_expired_stream_gives_the_rest_of_reasoning_and_calls() -> None:
    reader = StreamReader("j")
    begin: ToolCallDelta = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    shown = Chunk(job_id="j", reasoning="so", token_ids=[1], tool_calls=[begin])
    reader.take_range([marker(1), data(EntryId(1, 1), shown)])
    whole = Choice(
        index=0,
        text="",
        token_ids=[1, 2],
        finish_reason="tool_calls",
        reasoning="so be it",
        tool_calls=[{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    )
    (delivery,) = reader.take_result(Result(job_id="j", status="finished", choices=[whole]))
    assert delivery.chunk.reasoning == " be it" and delivery.chunk.token_ids == [2]
    assert delivery.chunk.tool_calls == [{"index": 0, "function": {"arguments": "}"}}]
