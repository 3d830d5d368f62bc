"""What one attempt has put out: entries, choices and usage, before any Redis."""

from dataclasses import replace
from typing import Any

import pytest

from engine.outputs import RequestOutput, TokenLogprob
from producer.contract import Chunk, Done, EntryId, Marker, ToolCallDelta, parse_entry
from tests.fakes.fake_engine import expected_logprob
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.job_streams import chunks_of, output, stored, stream
from worker.logprobs import LogprobWriter
from worker.outlet.job_stream import MAX_ENTRIES_PER_APPEND, JobStream
from worker.outlet.stored_stream import StoredStream
from worker.parsing.parsed_text import ParsedText
from worker.scripts import EndCommit


def test_entries_count_on_across_choices_with_one_choice_each() -> None:
    two = stream(num_choices=2)
    two.add(output("a", 1))
    two.add(output("x", 7, index=1))
    two.add(output("b", 2, offset=1))
    two.encode_pending()
    expected, flat, is_last = two.unsent()
    assert (expected, is_last) == ("", False)
    assert flat[::2] == ["2-0", "2-1", "2-2"]
    assert Marker.model_validate_json(flat[1]).attempt == 2
    chunks = [parse_entry(entry) for entry in flat[3::2]]
    assert [(c.index, c.text, c.token_ids) for c in chunks if isinstance(c, Chunk)] == [
        (0, "ab", [1, 2]),
        (1, "x", [7]),
    ]


def test_tokens_whose_text_is_held_back_are_stored_at_once() -> None:
    held = stream()
    held.add(output("", 5))
    held.encode_pending()
    assert '"token_ids":[5]' in held.unsent()[1][-1]


def test_what_is_acknowledged_is_not_sent_again() -> None:
    sent = stream()
    sent.add(output("a", 1))
    sent.encode_pending()
    sent.unsent()
    sent.acknowledge_sent()
    assert not sent.has_unsent
    sent.add(output("b", 2, offset=1))
    sent.encode_pending()
    expected, flat, _ = sent.unsent()
    assert expected == "2-1" and flat[0] == "2-2"


@pytest.mark.parametrize(
    ("stored", "is_ours", "next_id"),
    [(EntryId(2, 0), True, "2-1"), (EntryId(1, 9), True, "2-0"), (None, True, "2-0"), (EntryId(3, 0), False, None)],
)
def test_the_stored_end_says_where_to_go_on(stored: EntryId | None, is_ours: bool, next_id: str | None) -> None:
    sent = stream()
    sent.add(output("a", 1))
    sent.encode_pending()
    assert sent.acknowledge(stored) is is_ours
    if next_id is not None:
        assert sent.unsent()[1][0] == next_id


def test_entries_of_our_attempt_that_we_never_wrote_fence_us_out() -> None:
    assert stream().acknowledge(EntryId(2, 5)) is False


def done(of: JobStream) -> Done:
    return Done(job_id="j", done=True, status="finished", usage=of.usage)


def test_the_done_entry_is_the_last_and_is_not_sent_before_all_others() -> None:
    whole = stream()
    for number in range(MAX_ENTRIES_PER_APPEND - 1):
        whole.add(output("a", 1, offset=number))
        whole.encode_pending()
    whole.add(output("b", 2, offset=MAX_ENTRIES_PER_APPEND - 1))
    whole.seal(done(whole))
    _, flat, is_last = whole.unsent()
    assert len(flat) == 2 * MAX_ENTRIES_PER_APPEND and not is_last
    whole.acknowledge_sent()
    assert not whole.is_stored
    _, flat, is_last = whole.unsent()
    last, end = (parse_entry(wire) for wire in flat[1::2])
    assert isinstance(last, Chunk) and last.text == "b" and isinstance(end, Done) and is_last
    whole.acknowledge_sent()
    assert whole.is_stored and not whole.is_committed and not whole.has_unsent


def test_a_commit_goes_with_the_done_entry_or_not_at_all() -> None:
    commit = EndCommit("dependents", [])
    taken, contested = stream(), stream()
    for one in (taken, contested):
        one.seal(done(one), commit)
        one.unsent()
    taken.acknowledge_sent()
    assert taken.is_committed
    contested.unseal()
    assert not contested.is_sealed and contested.commit is None
    contested.add(output("late", 1))
    contested.seal(done(contested))
    assert [entry_id for entry_id in contested.unsent()[1][::2]] == ["2-0", "2-1", "2-2"]
    contested.acknowledge_sent()
    assert contested.is_stored and not contested.is_committed


def test_an_end_is_written_once() -> None:
    ended = stream()
    ended.add(output("a", 1))
    ended.end_choices("length")
    ended.encode_pending()
    ended.end_choices("cancelled")
    ended.encode_pending()
    (chunk,) = chunks_of(ended)
    assert chunk.finish_reason == "length" and ended.choices()[0].finish_reason == "length"


def test_what_is_stored_of_an_attempt_is_its_marker_then_its_output() -> None:
    begun = stream()
    assert not begun.is_marked and not begun.is_resumed
    begun.unsent()
    begun.acknowledge_sent()
    assert begun.is_marked and not begun.has_stored_output
    begun.add(output("a" * 100, 1))
    assert begun.num_unsent_bytes >= 100
    begun.encode_pending()
    assert begun.num_unsent_bytes >= 100
    begun.unsent()
    begun.acknowledge_sent()
    assert begun.has_stored_output and begun.num_unsent_bytes == 0


def test_output_after_the_done_entry_is_passed_over() -> None:
    sealed = stream()
    sealed.add(output("a", 1))
    sealed.end_choices("cancelled")
    sealed.seal(Done(job_id="j", done=True, status="cancelled", usage=sealed.usage))
    sealed.add(output("late", 2, offset=1))
    (choice,) = sealed.choices()
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("a", [1], "cancelled")


def test_usage_counts_all_choices_and_the_prompt_once() -> None:
    two = stream(num_choices=2)
    assert two.usage.cached_tokens == 0
    two.add(output("a", 1, 2, cached=3))
    two.add(output("b", 3, index=1), ParsedText("b", num_reasoning_tokens=1))
    assert two.usage.model_dump() == {
        "prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "cached_tokens": 3, "reasoning_tokens": 1,
    }  # fmt: skip


def test_reasoning_and_tool_calls_stand_in_entries_of_their_own_fields() -> None:
    call = stream()
    begin: ToolCallDelta = {
        "index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""},
    }  # fmt: skip
    call.add(output("<think>so</think>", 1), ParsedText(reasoning="so"))
    call.add(output("...", 2, offset=1), ParsedText(text="ok", tool_calls=(begin,)))
    call.add(output('{"a"', 3, offset=2), ParsedText(tool_calls=({"index": 0, "function": {"arguments": '{"a"'}},)))
    call.encode_pending()
    call.add(output("}", 4, offset=3), ParsedText(tool_calls=({"index": 0, "function": {"arguments": "}"}},)))
    call.end_choices("tool_calls")
    call.encode_pending()
    first, second = (parse_entry(entry) for entry in call.unsent()[1][3::2])
    assert isinstance(first, Chunk) and isinstance(second, Chunk)
    assert (first.reasoning, first.text, first.token_ids) == ("so", "ok", [1, 2, 3])
    assert first.tool_calls == [{**begin, "function": {"name": "f", "arguments": '{"a"'}}]
    assert second.tool_calls == [{"index": 0, "function": {"arguments": "}"}}]
    (choice,) = call.choices()
    assert (choice.reasoning, choice.text) == ("so", "ok")
    assert choice.tool_calls == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a"}'}}]
    assert second.reasoning is None


def test_thoughts_alone_are_no_text_and_stand_in_one_entry() -> None:
    thinking = stream()
    for token_id, thought in ((1, ""), (2, "so "), (3, "it is")):
        parsed = ParsedText(reasoning=thought, num_reasoning_tokens=1)
        thinking.add(output(thought, token_id, offset=token_id - 1), parsed)
        thinking.encode_pending()
    thinking.add(output("</think>", 4, offset=3), ParsedText(finish_reason="stop"))
    chunks = [(chunk.reasoning, chunk.text, chunk.reasoning_tokens) for chunk in chunks_of(thinking)]
    assert chunks == [(None, "", 1), ("so ", "", 1), ("it is", "", 1), (None, "", None)]
    (choice,) = thinking.choices()
    assert (choice.reasoning, choice.finish_reason) == ("so it is", "stop")


WRITER = LogprobWriter(FakeTokenizer())  # type: ignore[arg-type]
PROMPT = [4, 5]


def scored(*token_ids: int, offset: int = 0, index: int = 0, **fields: Any) -> RequestOutput:
    logprobs = [expected_logprob(token_id, 1) for token_id in token_ids]
    text = "".join(f" {token_id}" for token_id in token_ids)
    return RequestOutput(
        request_id="j", index=index, token_offset=offset, token_ids=list(token_ids), text=text, logprobs=logprobs,
        **fields,
    )  # fmt: skip


def scoring_stream(stored: StoredStream | None = None, attempt: int = 1) -> JobStream:
    opened = JobStream(
        "j", attempt, publish=True, num_choices=2, stored=stored, writer=WRITER, prompt=WRITER.echo(PROMPT)
    )
    opened.mark(Marker(job_id="j", attempt=attempt, worker="w", prompt_token_ids=PROMPT, seed=0, fingerprint="f"))
    return opened


def test_logprobs_stay_with_their_tokens_however_they_are_coalesced_and_the_prompt_comes_first() -> None:
    opened = scoring_stream()
    prompt_logprobs: list[TokenLogprob | None] = [None, expected_logprob(5, 1)]
    opened.add(scored(8, index=1))
    opened.encode_pending()
    opened.add(scored(1, prompt_logprobs=prompt_logprobs))
    opened.add(scored(2, 3, offset=1))
    opened.encode_pending()
    opened.add(scored(6, offset=3))
    other, first, second = chunks_of(opened)
    assert (other.index, other.prompt, second.prompt) == (1, None, None)
    assert first.prompt is not None and (first.prompt.text, first.prompt.token_ids) == (" 4 5", PROMPT)
    assert first.prompt.logprobs == [None, WRITER.write(expected_logprob(5, 1))]
    for chunk, token_ids in ((other, [8]), (first, [1, 2, 3]), (second, [6])):
        assert chunk.token_ids == token_ids
        assert chunk.logprobs == [WRITER.write(expected_logprob(token_id, 1)) for token_id in token_ids]
    opened.end_choices("length")
    assert opened.prompt == first.prompt
    assert first.logprobs is not None and second.logprobs is not None
    assert opened.choices()[0].logprobs == [*first.logprobs, *second.logprobs]


def test_a_resumed_stream_goes_on_with_the_stored_logprobs_and_shows_the_prompt_once() -> None:
    before = scoring_stream()
    before.add(scored(1, 2, prompt_logprobs=[None, expected_logprob(5, 1)]))
    resumed = scoring_stream(stored(before), attempt=2)
    resumed.add(replace(scored(1, 2), logprobs=None, is_replay=True))
    resumed.add(scored(3, offset=2))
    (chunk,) = chunks_of(resumed)
    assert (chunk.token_ids, chunk.prompt) == ([3], None)
    resumed.end_choices("length")
    expected = [WRITER.write(expected_logprob(token_id, 1)) for token_id in (1, 2, 3)]
    assert resumed.choices()[0].logprobs == expected
    assert resumed.prompt is not None and resumed.prompt == before.prompt


def test_a_prompt_without_output_comes_with_the_end() -> None:
    opened = scoring_stream()
    opened.add(scored(finish_reason="length", prompt_logprobs=[None, expected_logprob(5, 1)]))
    (chunk,) = chunks_of(opened)
    assert (chunk.token_ids, chunk.logprobs, chunk.finish_reason) == ([], [], "length")
    assert chunk.prompt is not None and chunk.prompt.logprobs is not None


def test_a_prompt_is_shown_without_logprobs_where_none_are_wanted() -> None:
    opened = JobStream("j", 1, publish=True, prompt=WRITER.echo(PROMPT))
    opened.mark(Marker(job_id="j", attempt=1, worker="w"))
    opened.add(output(" 1", 1))
    (chunk,) = chunks_of(opened)
    assert chunk.prompt is not None and (chunk.prompt.text, chunk.token_ids) == (" 4 5", [1])
