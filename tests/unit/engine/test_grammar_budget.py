"""What following a grammar costs is charged to it, whoever pays for it and however it ends."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from engine.grammar.budget import MAX_DEBT_SECONDS, SECONDS_PER_TOKEN, GrammarBudget, now
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import MaskFiller
from engine.grammar.matcher import MAX_FORCED_TOKENS, GrammarMatcher
from engine.grammar_spec import GrammarSpec
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE


@pytest.fixture
def compiler(tokenizer_dir: Path) -> GrammarCompiler:
    return GrammarCompiler(str(tokenizer_dir), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,))


class Panic(BaseException):
    """As PyO3 raises it."""


class FakeLLMatcher:
    """Admits everything, at a price, or panics."""

    def __init__(self, *, seconds: float = 0.0, panics: bool = False) -> None:
        self._seconds = seconds
        self._panics = panics
        self.num_calls = 0

    def _compute(self) -> None:
        self.num_calls += 1
        if self._panics:
            raise Panic("index out of bounds")
        end = time.thread_time() + self._seconds
        while time.thread_time() < end:
            pass

    def compute_ff_bytes(self) -> bytes:
        return b""

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return False

    def consume_token(self, token_id: int) -> bool:
        self._compute()
        return True

    def validate_tokens(self, token_ids: list[int]) -> int:
        self._compute()
        return 1

    def unsafe_compute_mask_ptr(self, pointer: int, num_bytes: int) -> None:
        self._compute()


def matcher_of(fake: FakeLLMatcher, budget: GrammarBudget) -> GrammarMatcher:
    return GrammarMatcher(fake, (EOS_TOKEN_ID,), budget=budget)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[GrammarMatcher], object]] = {
    "follow": lambda matcher: matcher.accept(1),
    "ask": lambda matcher: matcher.admits(1),
    "mask": lambda matcher: MaskFiller(VOCAB_SIZE).fill([matcher]),
}


@pytest.mark.parametrize("call", CALLS)
def test_all_that_is_asked_of_a_grammar_is_charged_in_full(call: str) -> None:
    budget = GrammarBudget()
    CALLS[call](matcher_of(FakeLLMatcher(seconds=0.12), budget))
    assert 0.11 < budget.debt_seconds < 0.2


def test_time_in_which_the_thread_waited_is_not_charged() -> None:
    budget = GrammarBudget()
    wall, cpu = now()
    assert budget.charge_since((wall - 10, cpu), 0) and budget.debt_seconds < 0.2
    assert not budget.charge_since((wall - 10, cpu - 5), 0) and budget.debt_seconds > 4.9


def test_each_mask_is_charged_to_its_own_grammar() -> None:
    budgets = [GrammarBudget() for _ in range(9)]
    fakes = [FakeLLMatcher(seconds=0.05 if i == 4 else 0.0) for i in range(9)]
    MaskFiller(VOCAB_SIZE).fill([matcher_of(*each) for each in zip(fakes, budgets, strict=True)])
    assert [budget.debt_seconds > 0.04 for budget in budgets] == [i == 4 for i in range(9)]


def test_of_an_overdrawn_grammar_only_who_makes_it_worse_fails() -> None:
    budget = GrammarBudget()
    cheap, dear = matcher_of(FakeLLMatcher(), budget), matcher_of(FakeLLMatcher(seconds=0.01), budget)
    budget.charge(MAX_DEBT_SECONDS + 0.1, 0, at=time.perf_counter())
    assert budget.is_overdrawn and not budget.is_exhausted
    cheap.accept(1)
    dear.accept(1)
    assert cheap.error is None
    assert dear.error is not None and "takes too long to follow" in dear.error and dear.is_too_costly


def test_the_choices_of_one_step_do_not_all_pay() -> None:
    budget = GrammarBudget()
    fakes = [FakeLLMatcher(seconds=0.2) for _ in range(20)]
    matchers = [matcher_of(fake, budget) for fake in fakes]
    for matcher in matchers:
        matcher.accept(1)
    assert sum(fake.num_calls for fake in fakes) <= 4
    assert all(matcher.error is not None for matcher in matchers[1:])


def test_an_account_recovers_with_tokens_and_with_time() -> None:
    budget, at = GrammarBudget(), time.perf_counter()
    budget.charge(1.0, 0, at)
    assert budget.is_exhausted
    budget.charge(0.0, round(0.6 / SECONDS_PER_TOKEN), at)
    assert budget.is_overdrawn and not budget.is_exhausted
    budget.charged_at -= 60  # a minute goes by
    assert not budget.is_overdrawn


def test_neither_cheap_tokens_nor_time_save_up_for_a_dear_one() -> None:
    budget, at = GrammarBudget(), time.perf_counter()
    budget.charge(0.0, 100_000, at)
    assert not budget.charge(1.0, 1, at + 1000)


@pytest.mark.parametrize("call", CALLS)
def test_a_panic_fails_its_sequence_alone(call: str) -> None:
    matcher = matcher_of(FakeLLMatcher(panics=True), GrammarBudget())
    CALLS[call](matcher)
    assert matcher.error == "the grammar cannot go on: index out of bounds"


def test_a_sequence_that_failed_has_a_mask_of_ones() -> None:
    matchers = [matcher_of(FakeLLMatcher(panics=True), GrammarBudget())] * 2
    assert (MaskFiller(VOCAB_SIZE).fill(matchers) == np.int32(-1)).all()


def test_an_overdrawn_grammar_is_begun_by_nobody_and_by_anyone_when_it_has_recovered(compiler: GrammarCompiler) -> None:
    grammar = compiler.prepare(GrammarSpec("regex", "a+")).result()
    grammar.budget.charge(1.0, 0, at=time.perf_counter())
    with pytest.raises(InvalidRequestError, match="takes too long to follow"):
        grammar.begin()
    grammar.budget.charged_at -= 100
    assert grammar.begin().consume_token(ord("a"))


def test_a_grammar_forces_so_much_at_once_and_no_more(compiler: GrammarCompiler) -> None:
    for length, is_too_long in ((MAX_FORCED_TOKENS, False), (MAX_FORCED_TOKENS + 1, True)):
        matcher = GrammarMatcher(compiler.compile(GrammarSpec("regex", "[ab]" + "c" * length)), (EOS_TOKEN_ID,))
        assert matcher.start(()) == []
        forced = matcher.accept(ord("a"))
        assert matcher.is_too_costly is is_too_long
        assert len(forced) == (0 if is_too_long else length + 1)  # and the end of sequence


def test_what_a_regex_forces_is_bounded_by_the_states_of_its_lexer(compiler: GrammarCompiler) -> None:
    """It is found in one call, which nothing interrupts: 240,000 bytes would take four times as long."""
    matcher = GrammarMatcher(compiler.compile(GrammarSpec("regex", "[ab]" + "ab" * 120_000)), (EOS_TOKEN_ID,))
    matcher.start(())
    matcher.accept(ord("a"))
    forced = re.search(r"forces ([\d,]+) tokens", matcher.error or "")
    assert forced is not None and MAX_FORCED_TOKENS < int(forced[1].replace(",", "")) <= 50_000


@pytest.mark.parametrize(("length", "num_lexemes"), [(100, 5000), (20, 40_000)])
def test_a_long_run_that_a_rule_repeats_is_refused_before_it_becomes_tokens(
    compiler: GrammarCompiler, length: int, num_lexemes: int
) -> None:
    """It is found byte by byte in one call, which the parser's items bound."""
    source = f'start: "b" | "a" RUN{{{num_lexemes}}}\nRUN: "{"x" * length}"'
    matcher = GrammarMatcher(compiler.compile(GrammarSpec("lark", source)), (EOS_TOKEN_ID,))
    matcher.start(())
    began = time.thread_time()
    assert matcher.accept(ord("a")) == [] and matcher.is_too_costly
    assert time.thread_time() - began < 0.5
    forced = re.search(r"forces ([\d,]+) bytes, more than 65,536 at once", matcher.error or "")
    assert forced is not None and int(forced[1].replace(",", "")) <= 6_100 * length


@pytest.mark.parametrize("length", [1, 16])
def test_as_many_lexemes_as_tokens_may_be_forced(compiler: GrammarCompiler, length: int) -> None:
    num_lexemes = MAX_FORCED_TOKENS // length
    source = f'start: "b" | "a" RUN{{{num_lexemes}}}\nRUN: "{"x" * length}"'
    matcher = GrammarMatcher(compiler.compile(GrammarSpec("lark", source)), (EOS_TOKEN_ID,))
    matcher.start(())
    assert len(matcher.accept(ord("a"))) == MAX_FORCED_TOKENS + 1 and matcher.error is None
