"""The rules of reading a stream, without a Redis: any mix of lost, late and repeated messages gives each chunk once."""

from hypothesis import given
from hypothesis import strategies as st

from producer.contract import Choice, Chunk, Done, EntryId, Marker, Result, ToolCallDelta
from producer.contract.keys import DATA_FIELD, MARKER_FIELD
from producer.stream_reader import Entry, StreamReader


def chunk(text: str, index: int = 0) -> Chunk:
    return Chunk(job_id="j", index=index, text=text, token_ids=[ord(character) for character in text])


def done() -> Done:
    return Done(job_id="j", done=True, status="finished")


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


def test_entries_behind_the_end_count_only_after_a_reset() -> None:
    reader = StreamReader("j")
    entries = [
        marker(1),
        data(EntryId(1, 1), chunk("old")),
        data(EntryId(1, 2), done()),
        data(EntryId(1, 3), chunk("ghost")),
    ]
    assert [delivery.chunk.text for delivery in reader.take_range(entries)] == ["old"]
    assert reader.done is not None
    again = reader.take_range([marker(2, reset=True), data(EntryId(2, 1), chunk("new"))])
    assert [(delivery.chunk.reset, delivery.chunk.text) for delivery in again] == [(True, ""), (False, "new")]
    assert reader.done is None


def test_a_reset_before_anything_was_shown_is_not_told() -> None:
    entries = [marker(1), data(EntryId(1, 1), chunk("old")), marker(2, reset=True), data(EntryId(2, 1), chunk("new"))]
    assert [delivery.chunk.text for delivery in StreamReader("j").take_range(entries)] == ["new"]
    resumed = StreamReader("j", EntryId(1, 1)).take_range(entries[2:])
    assert [(delivery.chunk.reset, str(delivery.entry_id)) for delivery in resumed] == [(True, "2-0"), (False, "2-1")]


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
def histories(draw: st.DrawFn) -> list[Entry]:
    """A stream of one to three attempts, some of which start over, and its end."""
    entries: list[Entry] = []
    number = 0
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        entries.append(marker(attempt, reset=attempt > 1 and draw(st.booleans())))
        for seq in range(1, draw(st.integers(0, 6)) + 1):
            number += 1
            entries.append(data(EntryId(attempt, seq), chunk(f"{number} ", draw(st.integers(0, 1)))))
    last = EntryId.parse(entries[-1][0])
    entries.append(data(EntryId(last.attempt, last.seq + 1), done()))
    return entries


def shown_text(history: list[Entry]) -> dict[int, str]:
    """What the contract says a reader holds in the end."""
    texts: dict[int, str] = {}
    for _, fields in history:
        if MARKER_FIELD.encode() in fields:
            if Marker.model_validate_json(fields[MARKER_FIELD.encode()]).reset:
                texts.clear()
        else:
            entry = Chunk.model_validate_json(fields[DATA_FIELD.encode()])
            if entry.text:
                texts[entry.index] = texts.get(entry.index, "") + entry.text
    return texts


@given(histories(), st.data())
def test_whatever_is_lost_late_or_repeated_each_chunk_is_shown_once_in_order(
    history: list[Entry], choices: st.DataObject
) -> None:
    reader = StreamReader("j")
    held: dict[int, str] = {}
    num_stored = 0

    def hold(deliveries: list[Chunk]) -> None:
        for delivered in deliveries:
            if delivered.reset:
                held.clear()
            else:
                held[delivered.index] = held.get(delivered.index, "") + delivered.text

    def read_stream() -> None:
        rest = [entry for entry in history[:num_stored] if EntryId.parse(entry[0]) > reader.last_id]
        hold([delivery.chunk for delivery in reader.take_range(rest)])

    while num_stored < len(history):
        num_stored += choices.draw(st.integers(1, 4))
        visible = [entry for entry in history[:num_stored] if DATA_FIELD.encode() in entry[1]]
        if visible and choices.draw(st.booleans()):
            deliveries = reader.take_published(published(choices.draw(st.sampled_from(visible))))
            if deliveries is None:
                read_stream()
            else:
                hold([delivery.chunk for delivery in deliveries])
    read_stream()
    assert reader.done is not None
    assert {index: text for index, text in held.items() if text} == shown_text(history)


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
