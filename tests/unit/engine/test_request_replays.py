"""Requests that come with tokens, and choices that share a prompt: replayed first, then as if never stopped."""

import logging
from typing import Any

import pytest

from engine.finish_rule import FinishRule
from engine.messages import FinishCode
from engine.outputs import RequestOutput
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes.request_tables import EOS, TOKEN_BYTES, Table, ids


def test_choices_that_come_with_tokens_are_replayed_before_anything_new(table: Table) -> None:
    held = ids("the brown")
    sequences = table.add("r", n=3, output_token_ids=[held, []], stop=("brown!",))
    (replay,) = table.outputs["r"]
    assert (replay.index, replay.token_offset, replay.token_ids, replay.text) == (0, 0, held, "the ")
    assert replay.is_replay and replay.finish_reason is None and not replay.finished
    table.say(sequences[0], "! and on")
    last = table.outputs["r"][-1]
    assert (last.finish_reason, last.is_replay, table.text("r")) == ("stop", False, "the ")
    assert table.outputs["r"][1].token_offset == len(held)


def test_the_child_is_told_what_was_replayed_and_of_no_choice_that_is_complete(table: Table) -> None:
    whole = [*ids("done"), EOS]
    table.add("other")
    request_sequences = table.add("r", n=3, output_token_ids=[ids("a b"), whole, ids("c")])
    assert [output.finish_reason for output in table.outputs["r"]] == [None, "stop", None]
    table.table.note_death("killed")
    messages = {m.sequence_id: (m.choice_index, m.output_token_ids) for m in table.table.start_more()}
    assert [messages[sequence] for sequence in request_sequences] == [(0, ids("a b")), (2, ids("c"))]


@pytest.mark.parametrize(
    ("output", "params", "num_taken", "text", "reason"),
    [
        ([*ids("hello"), EOS], {}, len(ids("hello")) + 1, "hello", "stop"),
        ([*ids("hello"), EOS], {"ignore_eos": True, "max_tokens": 50}, None, "hello", None),
        (ids("the brown"), {"max_tokens": len(ids("the brown")), "stop": ("brown!",)}, None, "the brown", "length"),
        (ids("the brown fox"), {"stop": ("brown",)}, len(ids("the brown")), "the ", "stop"),
        (ids("the brown fox"), {"max_tokens": 2}, 2, None, "length"),
    ],
)
def test_a_choice_that_comes_complete_ends_by_itself_and_takes_nothing_beyond(
    table: Table, output: list[int], params: dict[str, Any], num_taken: int | None, text: str | None, reason: str
) -> None:
    started = table.add("r", output_token_ids=[output], **params)
    (replay,) = table.outputs["r"]
    assert replay.token_ids == output[:num_taken] and replay.finish_reason == reason
    assert text is None or replay.text == text
    assert replay.finished is bool(reason) is not bool(started)
    assert table.table.take_forgotten() == [] and len(table.table) == len(started)


def test_a_replay_whose_callback_fails_drops_the_request(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[RequestOutput] = []

    def fail(output: RequestOutput) -> None:
        calls.append(output)
        raise ValueError("deaf")

    params = SamplingParams(n=2)
    rule = FinishRule.of(params, 1, max_len=100, eos_token_ids=())
    request = Request(
        "deaf", [[5]] * 2, params, priority=0, finish_rule=rule, output_token_ids=[[5], [6]], on_output=fail,
        token_bytes=TOKEN_BYTES,
    )  # fmt: skip
    with caplog.at_level(logging.CRITICAL + 1, logger="engine.request_table"):
        table.table.add(request)
    assert len(calls) == 1 and table.started() == [] and table.table.take_forgotten() == []


def test_what_a_later_choice_finds_in_the_cache_was_put_there_by_the_first(table: Table) -> None:
    first, second = table.add("r", n=2)
    table.tokens((first, 5, FinishCode.NONE), (second, 5, FinishCode.NONE), cached_tokens={first: 16, second: 48})
    assert [output.num_cached_tokens for output in table.outputs["r"]] == [16, 16]
    first, second = table.add("whole", n=2, output_token_ids=[[EOS]])[0], -1
    table.tokens((first, 5, FinishCode.NONE), cached_tokens={first: 32})
    assert [output.num_cached_tokens for output in table.outputs["whole"]] == [0, 32]


def test_the_choices_of_a_request_are_one_group_and_a_lone_one_is_none(table: Table) -> None:
    table.add("r", n=3)
    table.add("lone")
    table.table.note_death("killed")
    assert [message.group_id for message in table.table.start_more()] == [0, 0, 0, None]


def test_a_resumed_choice_reports_what_this_run_found_in_the_cache(table: Table) -> None:
    (sequence,) = table.add("r", output_token_ids=[ids("a b")])
    table.tokens(cached_tokens={sequence: 16})
    table.say(sequence, " c")
    table.table.note_death("killed")
    assert len(table.started()) == 1
    table.tokens(cached_tokens={sequence: 99})  # by a later child: the prompt was prefilled before
    table.say(sequence, " d")
    assert [output.num_cached_tokens for output in table.outputs["r"]] == [0, *[16] * (len(table.outputs["r"]) - 1)]
