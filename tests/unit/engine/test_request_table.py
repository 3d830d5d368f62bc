"""Requests and their sequences, with a child that is played by hand."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from engine.finish_rule import FinishRule
from engine.messages import AddSequence, FinishCode, StepOutput
from engine.outputs import RequestOutput, TokenLogprob
from engine.request import Request
from engine.request_table import MAX_DEATHS, RequestTable
from engine.sampling_params import SamplingParams
from engine.token_bytes import TokenBytes
from engine.token_logprobs import TokenLogprobs
from tests.fakes.tiny_tokenizers import byte_level_tokenizer

EOS = 1
RAW = byte_level_tokenizer()
TOKEN_BYTES = TokenBytes(RAW)


class Table:
    """A request table whose outputs are kept, by request id."""

    def __init__(self) -> None:
        self.table = RequestTable()
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(
        self, request_id: str, prompt: str = "hello", output_token_ids: Sequence[list[int]] = (), **params: object
    ) -> list[int]:
        """Adds and starts a request; its sequence ids."""
        assert self.table.reserve(request_id)
        outputs = self.outputs.setdefault(request_id, [])
        sampling = SamplingParams(**params)  # type: ignore[arg-type]
        request = Request(
            request_id,
            ids(prompt),
            sampling,
            priority=0,
            finish_rule=FinishRule.of(sampling, len(ids(prompt)), max_len=1000, eos_token_ids=(EOS,)),
            output_token_ids=output_token_ids,
            on_output=outputs.append,
            token_bytes=TOKEN_BYTES,
        )
        self.table.add(request)
        return [message.sequence_id for message in self.table.start_new(request)]

    def tokens(self, *entries: tuple[int, int, FinishCode], **fields: object) -> None:
        """One step's message: (sequence id, token id, code)."""
        self.table.apply(
            StepOutput(
                np.array([entry[0] for entry in entries], np.int64),
                np.array([entry[1] for entry in entries], np.int32),
                np.array([entry[2] for entry in entries], np.int8),
                **fields,  # type: ignore[arg-type]
            )
        )

    def say(self, sequence_id: int, text: str) -> None:
        self.tokens(*[(sequence_id, token_id, FinishCode.NONE) for token_id in ids(text)])

    def start_again(self) -> list[AddSequence]:
        """The child dies and another one starts."""
        self.table.note_death("killed by SIGSEGV")
        return list(self.table.start_more())

    def die(self) -> list[int]:
        """As `start_again`: the sequences that the child is told of."""
        return [message.sequence_id for message in self.start_again()]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs[request_id])


def ids(text: str) -> list[int]:
    return list(RAW.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def table() -> Table:
    return Table()


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
    assert [output.token_ids for output in table.outputs["r"]] == [ids("a"), ids("b")]
    assert table.outputs["r"][-1].finish_reason == "stop"
    assert table.table.take_forgotten() == []


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

    def fail(output: RequestOutput) -> None:
        raise ValueError("deaf")

    table.table._requests["deaf"].on_output = fail
    with caplog.at_level(logging.CRITICAL + 1, logger="engine.request_table"):
        table.tokens((first, 5, FinishCode.NONE), (second, 5, FinishCode.NONE), (sound, 5, FinishCode.NONE))
    assert sorted(table.table.take_forgotten()) == [first, second]
    assert len(table.outputs["sound"]) == 1
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


def test_a_poisonous_request_fails_after_three_deaths_and_its_batch_mates_go_on(table: Table) -> None:
    sequences = {name: table.add(name)[0] for name in ("one", "poison", "three")}
    assert table.die() == list(sequences.values())
    assert table.die() == [sequences["one"]]  # two deaths without a token: one suspect at a time
    table.say(sequences["one"], "a")
    assert [message.sequence_id for message in table.table.start_more()] == [sequences["poison"]]
    assert list(table.table.start_more()) == []
    assert table.die() == [sequences["three"]]  # "one" has proved harmless, and waits for the last suspect
    failed = table.outputs["poison"][-1]
    assert (failed.finish_reason, failed.error_kind, failed.finished) == ("error", "poison", True)
    assert failed.error is not None
    assert "SIGSEGV" in failed.error
    assert [output.finish_reason for output in table.outputs["one"]] == [None]
    assert table.outputs["three"] == []
    table.say(sequences["three"], "a")
    assert [message.sequence_id for message in table.table.start_more()] == [sequences["one"]]


def test_nothing_new_runs_beside_a_suspect(table: Table) -> None:
    """Else a death that is the newcomer's would be the suspect's third."""
    (suspect,) = table.add("suspect")
    table.die()
    assert table.die() == [suspect]
    newcomer = table.add("newcomer")
    assert newcomer == []
    table.say(suspect, "a")
    assert len(list(table.table.start_more())) == 1


def test_a_request_that_only_waits_in_the_child_is_not_to_blame_for_its_deaths(table: Table) -> None:
    (worked_on,), (waiting,) = table.add("one"), table.add("two")
    for _ in range(2):
        table.table.note_begun([worked_on])
        table.die()
    table.table.note_begun([worked_on])
    assert table.die() == [waiting]
    assert [output.error_kind for output in table.outputs["one"]] == ["poison"]
    assert table.outputs["two"] == []


def test_a_suspect_that_is_aborted_makes_room_for_the_next(table: Table) -> None:
    (first,), (second,) = table.add("one"), table.add("two")
    table.die()
    assert table.die() == [first]
    table.table.abort("one")
    assert [message.sequence_id for message in table.table.start_more()] == [second]


def test_a_token_between_two_deaths_clears_a_request_of_suspicion(table: Table) -> None:
    (sequence,) = table.add("r")
    for _ in range(2 * MAX_DEATHS):
        table.say(sequence, "a")
        assert table.die() == [sequence]
    assert all(output.finish_reason is None for output in table.outputs["r"])


# resumed requests ----------------------------------------------------------------------------------------------------


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
    table: Table, output: list[int], params: dict[str, object], num_taken: int | None, text: str | None, reason: str
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
        "deaf", [5], params, priority=0, finish_rule=rule, output_token_ids=[[5], [6]], on_output=fail,
        token_bytes=TOKEN_BYTES,
    )  # fmt: skip
    with caplog.at_level(logging.CRITICAL + 1, logger="engine.request_table"):
        table.table.add(request)
    assert len(calls) == 1 and list(table.table.start(request)) == [] and table.table.take_forgotten() == []


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
    table.tokens(cached_tokens={sequence: 99})  # a later child: the prompt was prefilled before
    table.say(sequence, " d")
    assert [output.num_cached_tokens for output in table.outputs["r"]] == [0, *[16] * (len(table.outputs["r"]) - 1)]


# log-probabilities, min_tokens, no tokens at all ----------------------------------------------------------------------


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


def test_a_grammar_that_cannot_be_had_ends_its_request_with_a_kind_of_its_own() -> None:
    table = Table()
    (first,), (second,) = table.add("a"), table.add("b")
    table.tokens(grammar_errors={first: "unclosed group"})
    assert (table.outputs["a"][-1].error_kind, table.outputs["a"][-1].error) == ("grammar", "unclosed group")
    table.say(second, "hi")
    assert table.outputs["b"][-1].error_kind is None
