"""What a request is told beside its tokens: log-probabilities, its prompt's scores, why its grammar cannot be had."""

import numpy as np
import pytest

from engine.messages import FinishCode
from engine.outputs import TokenLogprob
from engine.token_logprobs import TokenLogprobs
from tests.fakes.request_tables import Table, ids


def logprobs(rows: list[int], num_top: int = 2) -> TokenLogprobs:
    """Of row r: -r, and r + 1, r + 2, … as the likeliest."""
    return TokenLogprobs(
        np.array(rows, np.int64),
        -np.array(rows, np.float32),
        np.array([[row + 1 + i for i in range(num_top)] for row in rows], np.int32),
        np.array([[-row / 2 - i for i in range(num_top)] for row in rows], np.float32),
    )


def test_each_choice_gets_as_many_alternatives_as_it_asked_for_beside_its_tokens(table: Table) -> None:
    (plain,), (none,), (one,) = table.add("plain"), table.add("none", logprobs=0), table.add("one", logprobs=1)
    entries = [(sequence, ids("a")[0], FinishCode.NONE) for sequence in (none, plain, one)]
    table.tokens(*entries, logprobs=logprobs([0, 2]))
    table.table.abort("one")
    assert [output.logprobs for output in table.outputs["plain"]] == [None]
    assert [output.logprobs for output in table.outputs["none"]] == [[TokenLogprob(ids("a")[0], 0.0, [])]]
    token, end = table.outputs["one"]
    assert token.logprobs == [TokenLogprob(ids("a")[0], -2.0, [(3, -1.0)])]
    assert (end.token_ids, end.logprobs) == ([], [])


def test_a_prompts_logprobs_come_with_the_first_output_of_the_first_choice_however_they_arrived(table: Table) -> None:
    first, second = table.add("r", prompt="abcd", n=2, prompt_logprobs=0)
    table.tokens(prompt_logprobs=logprobs([first]))
    (message, other) = table.start_again()
    assert (message.num_scored, other.num_scored) == (1, None)
    table.tokens((second, 5, FinishCode.NONE), prompt_logprobs=logprobs([first]))
    table.tokens((first, 5, FinishCode.NONE), prompt_logprobs=logprobs([first]))
    table.say(first, "x")
    scores = [output.prompt_logprobs for output in table.outputs["r"]]
    tokens = ids("abcd")
    expected = [None, *(TokenLogprob(token_id, float(-first), []) for token_id in tokens[1:])]
    assert scores == [None, expected, None]


def test_a_prompt_that_was_not_scored_to_its_end_reports_nothing(table: Table) -> None:
    (sequence,) = table.add("r", prompt="abcd", prompt_logprobs=0)
    table.tokens(prompt_logprobs=logprobs([sequence]))
    table.table.abort("r")
    (output,) = table.outputs["r"]
    assert output.prompt_logprobs is None and output.finish_reason == "cancelled"


@pytest.mark.parametrize("code", [FinishCode.LENGTH, FinishCode.STOP])
def test_a_request_for_no_tokens_ends_with_its_prompts_scores_alone(table: Table, code: FinishCode) -> None:
    (sequence,) = table.add("r", prompt="ab", prompt_logprobs=0, logprobs=0, max_tokens=0)
    table.tokens((sequence, 5, code), prompt_logprobs=logprobs([sequence]), logprobs=logprobs([0]))
    (output,) = table.outputs["r"]
    assert (output.token_ids, output.text, output.logprobs, output.finish_reason) == ([], "", [], "length")
    assert output.finished and output.prompt_logprobs is not None and len(output.prompt_logprobs) == 2


def test_a_stop_string_that_the_first_min_tokens_complete_is_text(table: Table) -> None:
    (sequence,) = table.add("r", stop=("ab",), min_tokens=4)
    table.say(sequence, "ab" + "ab" + "x")
    assert "".join(output.text for output in table.outputs["r"]) == "ab"
    assert table.outputs["r"][-1].finish_reason == "stop"
    (sequence,) = table.add("s", stop=("ab",), min_tokens=3)
    table.say(sequence, "abcab")
    assert "".join(output.text for output in table.outputs["s"]) == "abc"


def test_a_resumed_request_reports_its_prompt_no_more_and_its_replay_has_no_logprobs(table: Table) -> None:
    (sequence,) = table.add("r", output_token_ids=[ids("a b")], logprobs=1, prompt_logprobs=1)
    assert [message.num_scored for message in table.start_again()] == [None]
    table.tokens((sequence, 5, FinishCode.NONE), logprobs=logprobs([0]))
    replay, token = table.outputs["r"]
    assert replay.logprobs is None and replay.prompt_logprobs is None and token.prompt_logprobs is None
    assert token.logprobs is not None and len(token.logprobs) == 1


def test_a_grammar_that_cannot_be_had_ends_its_request_with_a_kind_of_its_own(table: Table) -> None:
    (first,), (second,) = table.add("a"), table.add("b")
    table.tokens(grammar_errors={first: "unclosed group"})
    assert (table.outputs["a"][-1].error_kind, table.outputs["a"][-1].error) == ("grammar", "unclosed group")
    table.say(second, "hi")
    assert table.outputs["b"][-1].error_kind is None
