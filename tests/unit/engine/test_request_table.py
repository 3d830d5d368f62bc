"""Requests and their sequences, with a child that is played by hand."""

import gc
import logging
import weakref

import pytest

from engine.messages import FinishCode
from engine.outputs import RequestOutput
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.request_tables import RAW, Table, ids, make_request


def test_offsets_and_tokens_join_to_the_whole_answer(table: Table) -> None:
    (sequence,) = table.add("r")
    for text in ("the quick", " brown", " 你好"):
        table.say(sequence, text)
    outputs = table.outputs["r"]
    assert [output.token_offset for output in outputs] == list(range(len(outputs)))
    assert [token for output in outputs for token in output.token_ids] == ids("the quick") + ids(" brown") + ids(
        " 你好"
    )
    assert table.text("r") == "the quick brown 你好"


def test_the_token_that_completes_a_stop_string_counts_and_later_ones_do_not(table: Table) -> None:
    (sequence,) = table.add("r", stop=("brown",))
    table.say(sequence, "the quick brown fox jumps")
    last = table.outputs["r"][-1]
    token_ids = [token for output in table.outputs["r"] for token in output.token_ids]
    assert table.text("r") == "the quick "
    assert (last.finish_reason, last.finished) == ("stop", True)
    assert RAW.decode(token_ids).startswith("the quick brown")
    assert "brown" not in RAW.decode(token_ids[:-1])
    assert table.table.take_forgotten() == [sequence]
    assert len(table.table) == 0


def test_a_stop_token_is_counted_and_has_no_text(table: Table) -> None:
    (sequence,) = table.add("r")
    table.tokens((sequence, ids("a")[0], FinishCode.NONE), (sequence, ids("b")[0], FinishCode.STOP))
    assert table.text("r") == "a"
    (output,) = table.outputs["r"]
    assert (output.token_ids, output.finish_reason) == (ids("a") + ids("b"), "stop")
    assert table.table.take_forgotten() == []


def test_what_several_steps_gave_is_delivered_at_once_and_an_end_waits_for_no_delivery(table: Table) -> None:
    (going_on,), (ending,) = table.add("goes on"), table.add("ends")
    first, second = ids("a")[0], ids("b")[0]
    for token_id in (first, second):
        table.hold((going_on, token_id, FinishCode.NONE), (ending, token_id, FinishCode.NONE))
    assert table.table.has_fresh and not table.outputs["goes on"]
    table.hold((going_on, first, FinishCode.NONE), (ending, first, FinishCode.LENGTH))
    (end,) = table.outputs["ends"]
    assert (end.token_offset, end.token_ids, end.text, end.finished) == (0, [first, second, first], "aba", True)
    table.table.deliver()
    table.say(going_on, "b")
    assert [(output.token_offset, output.text) for output in table.outputs["goes on"]] == [(0, "aba"), (3, "b")]
    assert not table.table.has_fresh


@pytest.mark.parametrize("ending", ["cancelled", "died"])
def test_tokens_that_were_not_delivered_come_with_another_end(table: Table, ending: str) -> None:
    (sequence,) = table.add("r")
    table.hold((sequence, ids("a")[0], FinishCode.NONE))
    if ending == "cancelled":
        table.table.abort("r")
    else:
        table.table.fail_all("the device is gone", "died")
    (output,) = table.outputs["r"]
    assert (output.text, output.finished) == ("a", True)
    assert not table.table.has_fresh


def test_tokens_that_were_not_delivered_when_the_child_died_are_neither_lost_nor_sent_twice(table: Table) -> None:
    (sequence,) = table.add("r")
    table.hold((sequence, ids("a")[0], FinishCode.NONE))
    (message,) = table.start_again()
    assert message.output_token_ids == ids("a")
    table.table.deliver()
    table.say(message.sequence_id, "b")
    assert [output.text for output in table.outputs["r"]] == ["a", "b"]


def test_nothing_of_a_request_is_left_behind_its_end(table: Table) -> None:
    recorder = OutputRecorder()
    is_there = weakref.ref(recorder)
    table.table.add(make_request("r", on_output=recorder))
    del recorder
    (sequence,) = table.started()
    gc.disable()  # a worker's collections are rare
    try:
        table.tokens((sequence, 5, FinishCode.NONE))
        assert is_there() is not None
        table.tokens((sequence, 5, FinishCode.LENGTH))
        assert is_there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", ["length", "cancelled", "error"])
def test_text_held_back_for_a_stop_string_is_released_at_another_end(table: Table, ending: str) -> None:
    (sequence,) = table.add("r", stop=("brown!",))
    table.say(sequence, "the brown")
    assert table.text("r") == "the "
    if ending == "length":
        table.tokens((sequence, ids(" fox")[0], FinishCode.LENGTH))
    elif ending == "cancelled":
        table.table.abort("r")
    else:
        table.tokens(errors={sequence: "not a number"})
    assert table.text("r").startswith("the brown")
    assert table.outputs["r"][-1].finish_reason == ending


def test_choices_end_one_by_one_and_the_last_one_finishes_the_request(table: Table) -> None:
    first, second = table.add("r", n=2)
    table.tokens((second, 5, FinishCode.LENGTH))
    assert not table.table.reserve("r")
    table.tokens((first, 5, FinishCode.LENGTH))
    assert [(output.index, output.finished) for output in table.outputs["r"]] == [(1, False), (0, True)]
    assert table.table.reserve("r")


def test_an_error_ends_one_sequence_alone(table: Table) -> None:
    (broken,), (sound,) = table.add("broken"), table.add("sound")
    table.tokens((sound, 5, FinishCode.NONE), errors={broken: "not a number"})
    output = table.outputs["broken"][-1]
    assert (output.finish_reason, output.error, output.error_kind) == ("error", "not a number", "refused")
    assert table.outputs["sound"][-1].finish_reason is None


def test_cached_prompt_tokens_are_reported_with_every_output(table: Table) -> None:
    (sequence,) = table.add("r")
    table.tokens(cached_tokens={sequence: 16, 999: 3})
    table.say(sequence, "a b")
    assert {output.num_cached_tokens for output in table.outputs["r"]} == {16}


def test_what_is_found_in_the_cache_behind_forced_tokens_is_reported(table: Table) -> None:
    """A grammar's first tokens are there before its sequence has a place to run."""
    (sequence,) = table.add("r")
    table.say(sequence, "a b")
    table.tokens(cached_tokens={sequence: 16})
    table.say(sequence, " c")
    assert table.outputs["r"][-1].num_cached_tokens == 16


def test_what_a_later_child_finds_in_the_cache_is_not(table: Table) -> None:
    (sequence,) = table.add("r")
    table.say(sequence, "a b")
    table.table.note_death("killed")
    assert len(table.started()) == 1
    table.tokens(cached_tokens={sequence: 16})
    table.say(sequence, " c")
    assert table.outputs["r"][-1].num_cached_tokens == 0


def test_tokens_on_their_way_after_an_abort_are_dropped(table: Table) -> None:
    (sequence,) = table.add("r")
    table.table.abort("r")
    assert table.table.take_forgotten() == [sequence]
    table.say(sequence, "late")
    table.tokens(errors={sequence: "late"})
    assert [output.finish_reason for output in table.outputs["r"]] == ["cancelled"]
    table.table.abort("r")
    table.table.abort("unknown")


def test_a_request_whose_callback_fails_is_dropped_and_harms_nobody(
    table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = table.add("deaf", n=2)
    (sound,) = table.add("sound")

    heard: list[RequestOutput] = []

    def fail(output: RequestOutput) -> None:
        heard.append(output)
        raise ValueError("deaf")

    table.table._requests["deaf"].on_output = fail
    with caplog.at_level(logging.CRITICAL + 1, logger="engine.request_table"):
        table.tokens((first, 5, FinishCode.NONE), (second, 5, FinishCode.NONE), (sound, 5, FinishCode.NONE))
    assert sorted(table.table.take_forgotten()) == [first, second]
    assert len(heard) == 1 and len(table.outputs["sound"]) == 1
    assert table.table.reserve("deaf")


def test_after_a_death_each_sequence_goes_on_with_its_tokens(table: Table) -> None:
    (first,), (second,) = table.add("one"), table.add("two")
    table.say(first, "the quick")
    table.table.note_death("killed")
    assert not table.table.is_child_busy
    messages = list(table.table.start_more())
    assert [(message.sequence_id, message.output_token_ids) for message in messages] == [
        (first, ids("the quick")),
        (second, []),
    ]
    table.say(first, " brown")
    assert table.text("one") == "the quick brown"


def test_a_request_that_comes_while_no_child_is_ready_starts_after_those_before_it(table: Table) -> None:
    (first,) = table.add("one")
    table.table.note_death("killed")
    table.wait("two", n=2)
    started = table.started()
    assert len(started) == 3 and started[0] == first
    assert table.started() == []
