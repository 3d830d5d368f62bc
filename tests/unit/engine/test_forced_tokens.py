"""What a step comes to once the grammars of its sequences have gone on, and what becomes of those that cannot."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engine.grammar.forced_tokens import ForcedTokens, append_forced_tokens
from engine.grammar_spec import GrammarSpec
from engine.messages import AddSequence, FinishCode, StepOutput
from engine.runner.slots import SequenceSlots
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceLimits, create_sequence
from engine.token_logprobs import TokenLogprobs
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE

LIMITS = SequenceLimits(vocab_size=100, max_len=64, eos_token_ids=(), described="a test")
PROMPT = [1, 2, 3]
FORCED = GrammarSpec("json_schema", '{"const": {"a": [1, 2, "forced"]}}')
DEAD_END = GrammarSpec("lark", 'start: ("a" | "b") ("c" | "d") /[^\\s\\S]/')


class PlayedMatcher:
    """Forces these tokens behind any other, or fails at it."""

    def __init__(self, forced: tuple[int, ...] = (), *, fails: bool = False) -> None:
        self._forced = forced
        self._fails = fails
        self.error: str | None = None
        self.accepted: list[int] = []

    def accept(self, token_id: int) -> list[int]:
        self.accepted.append(token_id)
        self.error = "it fails" if self._fails else None
        return list(self._forced)


def go_on(matchers: list[PlayedMatcher | None], ended: tuple[int, ...] = ()) -> ForcedTokens:
    """Sequence i, of two more tokens at most, was given token 50 + i, whose log-probability is that number.

    `ended`: those that are over with it.
    """
    slots = SequenceSlots(max_num_seqs=len(matchers), max_len=LIMITS.max_len, block_size=4)
    for sequence_id, matcher in enumerate(matchers):
        message = AddSequence(
            sequence_id=sequence_id, prompt_token_ids=[*PROMPT, 50 + sequence_id], params=SamplingParams(max_tokens=2)
        )
        sequence = create_sequence(message, LIMITS)
        sequence.grammar = cast(Any, matcher)
        assert slots.acquire(sequence) == sequence_id
    rows = np.arange(len(matchers))
    token_ids = (50 + rows).astype(np.int32)
    nothing = np.zeros((len(rows), 0))
    codes = np.full(len(rows), FinishCode.NONE, np.int8)
    codes[list(ended)] = FinishCode.LENGTH
    logprobs = TokenLogprobs(rows, token_ids.astype(np.float32), nothing.astype(np.int32), nothing.astype(np.float32))
    return append_forced_tokens(slots, slots.rows(rows), StepOutput(rows, token_ids, codes, logprobs=logprobs))


def test_who_fails_loses_the_token_and_all_others_keep_theirs_with_its_log_probability() -> None:
    forced = go_on([None, PlayedMatcher(fails=True), PlayedMatcher(), PlayedMatcher(fails=True), None])
    output = forced.output
    assert output.sequence_ids.tolist() == [0, 2, 4] and output.token_ids.tolist() == [50, 52, 54]
    assert output.logprobs is not None
    assert output.logprobs.rows.tolist() == [0, 1, 2] and output.logprobs.logprobs.tolist() == [50, 52, 54]
    assert output.grammar_errors == {1: "it fails", 3: "it fails"}
    assert (forced.ended, forced.extended) == ([1, 3], [])


def test_what_is_forced_comes_behind_all_that_was_sampled_up_to_the_end_of_its_sequence() -> None:
    unended, ended = PlayedMatcher((7, 8, 9)), PlayedMatcher((7, 8))
    forced = go_on([PlayedMatcher((7,)), None, unended, ended], ended=(3,))
    assert forced.output.sequence_ids.tolist() == [0, 1, 2, 3, 0, 2, 2]
    assert forced.output.token_ids.tolist() == [50, 51, 52, 53, 7, 7, 8]
    goes_on, is_over = FinishCode.NONE, FinishCode.LENGTH
    codes = [goes_on, goes_on, goes_on, is_over, goes_on, goes_on, is_over]
    assert forced.output.finish_codes.tolist() == codes
    assert (forced.ended, forced.extended) == ([2], [0])
    assert unended.accepted == [52] and ended.accepted == [], "whoever is over is left alone"


def make_driver(tokenizer_dir: Path) -> CoreDriver:
    return CoreDriver(FakeRunner(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,), model_dir=str(tokenizer_dir)))


@pytest.mark.parametrize("max_tokens", [3, 9])
def test_a_grammar_that_fails_at_the_last_token_fails_its_sequence_once(tokenizer_dir: Path, max_tokens: int) -> None:
    driver = make_driver(tokenizer_dir)
    failing = driver.add(PROMPT, max_tokens=max_tokens, grammar=DEAD_END)
    driver.run()
    assert "admits no token here" in driver.errors[failing] and len(driver.outputs[failing]) == 2


def test_an_output_that_is_not_what_its_grammar_forces_is_not_gone_on_with(tokenizer_dir: Path) -> None:
    driver = make_driver(tokenizer_dir)
    failing = driver.add(PROMPT, output=[ord("{"), ord("a")], grammar=FORCED)
    driver.run()
    assert driver.errors == {failing: f"token {ord('a')} stands where the grammar forces another"}


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_though_all_that_follows_is_forced(
    tokenizer_dir: Path,
) -> None:
    driver = make_driver(tokenizer_dir)
    params = SamplingParams(max_tokens=99, grammar=FORCED, prompt_logprobs=0)
    driver.core.add(AddSequence(sequence_id=0, prompt_token_ids=PROMPT, params=params, num_scored=0))
    driver.outputs[0] = []
    driver.run()
    assert driver.finished == {0: FinishCode.STOP} and driver.core.get_stats().num_prompt_tokens == len(PROMPT)
    assert bytes(driver.outputs[0][:-1]) == b'{"a": [1, 2, "forced"]}'
