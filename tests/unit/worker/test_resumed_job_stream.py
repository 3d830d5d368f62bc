"""What an attempt makes of the output that it finds: it goes on from there, or says that it cannot."""

from dataclasses import replace

import pytest

from producer.contract import Chunk, ToolCallDelta, parse_entry
from tests.fakes.job_streams import output, stored, stream
from worker.errors import ReplayMismatchError
from worker.outlet.job_stream import JobStream
from worker.parsing.parsed_text import ParsedText

CALL: ToolCallDelta = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SHOWN = ParsedText("ok", reasoning="so", tool_calls=(CALL,), num_reasoning_tokens=1)


def resume() -> JobStream:
    """Behind two tokens that came to `SHOWN`."""
    before = stream()
    before.add(output("…", 1, 2), SHOWN)
    return JobStream("j", 3, publish=True, stored=stored(before))


@pytest.mark.parametrize(
    ("token_ids", "parsed"),
    [
        ([1, 3], SHOWN),
        ([1], SHOWN),
        ([1, 2], replace(SHOWN, text="o")),
        ([1, 2], replace(SHOWN, reasoning="")),
        ([1, 2], replace(SHOWN, tool_calls=())),
    ],
    ids=["token", "number of tokens", "text", "reasoning", "calls"],
)
def test_a_replay_that_comes_to_anything_else_than_what_is_stored_is_a_mismatch(
    token_ids: list[int], parsed: ParsedText
) -> None:
    with pytest.raises(ReplayMismatchError):
        resume().add(replace(output("…", *token_ids), is_replay=True), parsed)


def test_of_a_replay_an_end_is_written_that_was_not_stored_and_nothing_else() -> None:
    resumed = resume()
    resumed.add(replace(output("…", 1, 2), is_replay=True), SHOWN)
    resumed.encode_pending()
    assert not resumed.has_unsent and resumed.is_resumed and not resumed.is_marked
    resumed.add(replace(output("…", 1, 2), is_replay=True), replace(SHOWN, finish_reason="stop"))
    resumed.encode_pending()
    expected, flat, _ = resumed.unsent()
    (chunk,) = [parse_entry(wire) for wire in flat[1::2]]
    assert isinstance(chunk, Chunk) and expected == "2-1"
    assert (chunk.token_ids, chunk.text, chunk.finish_reason) == ([], "", "stop")


@pytest.mark.parametrize("has_counted", [True, False])
def test_a_thoughts_tokens_are_counted_once_also_those_that_an_older_worker_stored_uncounted(has_counted: bool) -> None:
    before, thought = stream(), replace(SHOWN, num_reasoning_tokens=2)
    before.add(output("…", 1, 2), thought if has_counted else replace(thought, num_reasoning_tokens=0))
    resumed = JobStream("j", 3, publish=True, stored=stored(before))
    resumed.add(replace(output("…", 1, 2), is_replay=True), thought)
    resumed.add(output("…", 3, offset=2), ParsedText(num_reasoning_tokens=1, finish_reason="stop"))
    resumed.encode_pending()
    _, flat, _ = resumed.unsent()
    (chunk,) = [parse_entry(wire) for wire in flat[1::2]]
    assert isinstance(chunk, Chunk) and chunk.reasoning_tokens == (1 if has_counted else 3)
    assert resumed.usage.reasoning_tokens == 3


def test_a_stored_end_that_the_replay_does_not_come_to_is_a_mismatch() -> None:
    before = stream()
    before.add(output("a", 1), ParsedText("a", finish_reason="stop"))
    resumed = JobStream("j", 3, publish=True, stored=stored(before))
    with pytest.raises(ReplayMismatchError):
        resumed.add(replace(output("a", 1), is_replay=True))
