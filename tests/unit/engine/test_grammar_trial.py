"""Grammars that would take the time, the memory or the process of whoever compiles them are refused."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import EngineError, InvalidRequestError
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.pending import PendingGrammars, PreparedSequence
from engine.grammar.trial import GrammarTrials
from engine.grammar_spec import GrammarSpec
from engine.messages import AddSequence
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceLimits, create_sequence
from tests.fakes.processes import children_of
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE


def schema(value: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


GOOD = schema({"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}}})
MULTIPLES = schema({"allOf": [{"type": "integer", "multipleOf": number} for number in (7, 11, 13, 17, 19, 23)]})
CHAIN = GrammarSpec("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"')
STARS = GrammarSpec("regex", "a*" * 20_000)
LONG = GrammarSpec("choice", json.dumps(["ab" * 120_000]))
BEHIND = GrammarSpec("regex", "[ab]" + "ab" * 120_000)
EITHER = GrammarSpec("choice", json.dumps(["yes", "no" + "." * 5_000]))
AMBIGUOUS = GrammarSpec("lark", f"start: e\ne: W | {' | '.join('e ' * number for number in range(2, 12))}\nW: /[a-z ]/")


@pytest.fixture(scope="module")
def trials(tokenizer_dir: Path) -> Iterator[GrammarTrials]:
    yield GrammarTrials(str(tokenizer_dir), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (MULTIPLES, r"\(json_schema\) takes longer than 2 s to compile: make it smaller"),
        (CHAIN, r"\(lark\) is nested too deeply, or too long a sequence, to compile: make it flatter"),
        (STARS, r"\(regex\) takes more than 256 MiB to compile: make it smaller"),
        (LONG, r"forces 240,000 bytes, more than 65,536 at once: let it force less text"),
        (BEHIND, r"forces \d+,\d{3} tokens, more than 4,096 at once: let it force less text"),
        (EITHER, r"forces 5,001 tokens, more than 4,096 at once: let it force less text"),
        (AMBIGUOUS, r"takes too long to follow, \d\.\d s more than its tokens may: say less in two ways"),
        (GrammarSpec("regex", "(a"), r"\(regex\) does not compile: (?s:.*)unclosed group"),
    ],
    ids=["time", "depth", "memory", "beginning", "behind a choice", "one of two", "ambiguity", "fault"],
)
def test_a_grammar_that_is_not_to_be_had_is_refused_with_its_reason(
    trials: GrammarTrials, spec: GrammarSpec, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^the grammar {reason}") as refusal:
        trials.check(spec)
    assert refusal.value.param == "grammar"
    assert trials.check(GOOD) < 32 << 20, "the next one is tried as if nothing had been"


def test_a_schema_of_thousands_of_properties_may_be_had(trials: GrammarTrials) -> None:
    names = [f"property {number}" for number in range(2000)]
    trials.check(
        schema({"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names})
    )


def test_a_trial_whose_process_is_lost_is_no_refusal_and_the_next_one_has_another(tokenizer_dir: Path) -> None:
    trials = GrammarTrials(str(tokenizer_dir), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,))
    others = set(children_of(os.getpid()))
    trials.check(GOOD)
    for pid in set(children_of(os.getpid())) - others:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"could not be tried, .*: send it again") as error:
        for _ in range(2):  # by the lane that was lost, in its turn
            trials.check(GOOD)
    assert not isinstance(error.value, InvalidRequestError)
    trials.check(GOOD)


def test_a_refused_grammar_is_tried_once(tokenizer_dir: Path) -> None:
    asked = []

    def refuse(spec: GrammarSpec) -> int:
        asked.append(spec)
        raise InvalidRequestError("the grammar is too much", param="grammar")

    compiler = make_compiler(tokenizer_dir, refuse)
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match="too much"):
            compiler.compile(GOOD)
    assert asked == [GOOD]


def test_what_could_not_be_tried_is_tried_again(tokenizer_dir: Path) -> None:
    answers: list[int | Exception] = [EngineError("lost"), 0]

    def answer(spec: GrammarSpec) -> int:
        if isinstance(given := answers.pop(0), Exception):
            raise given
        return given

    compiler = make_compiler(tokenizer_dir, answer)
    with pytest.raises(EngineError, match="lost"):
        compiler.compile(GOOD)
    assert compiler.compile(GOOD).is_accepting() is False


def test_who_asks_for_a_grammar_that_is_being_compiled_waits_for_that_one(tokenizer_dir: Path) -> None:
    may_end, asked = threading.Event(), []

    def wait(spec: GrammarSpec) -> int:
        asked.append(spec)
        assert may_end.wait(30)
        return 0

    compiler = make_compiler(tokenizer_dir, wait)
    with ThreadPoolExecutor(2) as threads:
        first, second = compiler.prepare(GOOD, threads), compiler.prepare(GOOD, threads)
        may_end.set()
        assert first.result(30) is second.result(30), "and so they have one account"
    assert asked == [GOOD]


def test_the_choices_of_a_grammar_that_cannot_be_tried_share_one_trial_and_hold_up_no_other(
    tokenizer_dir: Path,
) -> None:
    may_fail, asked = threading.Event(), []

    def answer(spec: GrammarSpec) -> int:
        asked.append(spec)
        if spec == GOOD:
            assert may_fail.wait(30)
            raise EngineError("nothing was heard of it for 60 s")
        return 0

    pending = PendingGrammars(make_compiler(tokenizer_dir, answer))
    for sequence_id in range(8):
        pending.add(sequence_of(sequence_id, GOOD))
    other = GrammarSpec("regex", "a+")
    pending.add(sequence_of(8, other))
    assert [done.sequence.sequence_id for done in take(pending, 1)] == [8]
    may_fail.set()
    assert [done.error for done in take(pending, 8)] == ["nothing was heard of it for 60 s"] * 8
    assert asked.count(GOOD) == 1


def test_all_that_follow_a_grammar_pay_into_one_account(tokenizer_dir: Path) -> None:
    compiler = make_compiler(tokenizer_dir, lambda spec: 0)
    pending = PendingGrammars(compiler)
    for sequence_id in range(2):
        pending.add(sequence_of(sequence_id, GOOD))
    first, second = (done.sequence.grammar for done in take(pending, 2))
    assert first is not None and second is not None
    compiler.prepare(GOOD).result().budget.charge(1.0, 0, at=time.perf_counter())
    for matcher in (first, second):
        matcher.accept(ord("{"))
        assert matcher.is_too_costly


def sequence_of(sequence_id: int, spec: GrammarSpec) -> Sequence:
    limits = SequenceLimits(vocab_size=VOCAB_SIZE, max_len=100, eos_token_ids=(EOS_TOKEN_ID,), described="")
    message = AddSequence(sequence_id=sequence_id, prompt_token_ids=[1], params=SamplingParams(grammar=spec))
    return create_sequence(message, limits)


def take(pending: PendingGrammars, count: int) -> list[PreparedSequence]:
    taken: list[PreparedSequence] = []
    while len(taken) < count:
        taken += pending.take_done(waits=True)
    return taken


def test_large_grammars_are_not_kept_in_any_number(tokenizer_dir: Path) -> None:
    asked: list[str] = []

    def note(spec: GrammarSpec) -> int:
        asked.append(spec.source)
        return 100 << 20 if spec.kind == "regex" else 0

    compiler = make_compiler(tokenizer_dir, note)
    for source in ("a", "b", "b", "c", "a"):
        compiler.compile(GrammarSpec("regex", source))
        compiler.compile(GrammarSpec("choice", '["small"]'))
    assert [source for source in asked if len(source) == 1] == ["a", "b", "c", "a"]
    assert asked.count('["small"]') == 1


def test_of_many_small_grammars_those_that_were_used_last_are_kept(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.grammar.compiler._MAX_CACHED", 2)
    asked: list[str] = []

    def note(spec: GrammarSpec) -> int:
        asked.append(spec.source)
        return 0

    compiler = make_compiler(tokenizer_dir, note)
    for source in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(GrammarSpec("regex", source))
    assert asked == ["a", "b", "c", "b"]


def make_compiler(tokenizer_dir: Path, try_apart: object) -> GrammarCompiler:
    return GrammarCompiler(
        str(tokenizer_dir),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_TOKEN_ID,),
        try_apart=try_apart,  # type: ignore[arg-type]
    )
