"""What counts of a step of which one sequence failed: the others' tokens, each with its own log-probability, once."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.messages import AddSequence
from engine.runner.batch_inputs import BatchInputs
from engine.sampling_params import SamplingParams
from engine.step_plan import SampledTokens
from engine.token_logprobs import TokenLogprobs
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output

VOCAB_SIZE = 60
RAISING = 55  # no prompt's but one
FIRST = [1, 2, 3]
SAID = undisturbed_output(FakeRunner(vocab_size=VOCAB_SIZE).info, FIRST, max_tokens=1)[0]  # behind it
OTHERS = [token for token in range(4, 50) if token != SAID]


class TellingRunner(FakeRunner):
    """The log-probability of each token is the token, so that it shows whose it is."""

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        sampled, scored = super().execute(inputs), inputs.scored
        return replace(
            sampled,
            logprobs=_telling(np.arange(len(sampled.token_ids)), sampled.token_ids),
            prompt_logprobs=None if scored is None else _telling(scored.slots, scored.token_ids),
        )


def _telling(rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> TokenLogprobs:
    nothing = np.zeros((len(rows), 0))
    return TokenLogprobs(rows, token_ids.astype(np.float32), nothing.astype(np.int32), nothing.astype(np.float32))


def test_a_chunk_that_raises_fails_its_sequence_though_it_yields_no_token() -> None:
    driver = CoreDriver(FakeRunner(vocab_size=VOCAB_SIZE, raising_token=RAISING), max_num_tokens=8)
    failing, other = driver.add([RAISING, *OTHERS[:19]]), driver.add(FIRST)
    driver.run()
    assert list(driver.errors) == [failing] and "makes the model raise" in driver.errors[failing]
    assert len(driver.outputs[other]) == 8


def test_no_other_prompt_is_begun_with_what_a_failed_one_had_computed() -> None:
    common = OTHERS[:16]
    driver = CoreDriver(FakeRunner(vocab_size=VOCAB_SIZE, raising_token=RAISING), max_num_tokens=8)
    failing = driver.add([*common, RAISING])
    driver.run()
    assert list(driver.errors) == [failing]
    for num_cached in (0, 16):  # what one that did not fail had computed is found
        driver.add([*common, 50])
        driver.run()
        assert driver.core.get_stats().num_cached_tokens == num_cached


def test_beside_a_decode_that_fails_others_go_on_and_a_prompt_is_counted_as_it_is() -> None:
    runner = FakeRunner(vocab_size=VOCAB_SIZE, poison_token=SAID)
    driver = CoreDriver(runner, max_num_tokens=8)
    failing, decode, prompt = driver.add(FIRST), driver.add(OTHERS[:2]), driver.add(OTHERS[2:20], max_tokens=1)
    driver.run()
    assert list(driver.errors) == [failing] and len(driver.outputs[prompt]) == 1
    assert driver.outputs[decode] == undisturbed_output(runner.info, OTHERS[:2], max_tokens=8)
    assert driver.core.get_stats().num_prompt_tokens == len(FIRST) + 20


def test_each_token_keeps_its_log_probability_where_another_of_its_step_fails() -> None:
    poisonous = TellingRunner(vocab_size=VOCAB_SIZE, poison_token=SAID)
    for runner in (poisonous, TellingRunner(vocab_size=VOCAB_SIZE, raising_token=SAID)):
        driver = CoreDriver(runner, max_num_tokens=64)
        for prompt in (OTHERS[:2], FIRST, OTHERS[2:5]):
            driver.add(prompt, logprobs=0)
        while driver.core.has_work():
            step = driver.step()
            assert step.logprobs is not None
            assert step.logprobs.logprobs.tolist() == step.token_ids[step.logprobs.rows].tolist()
            assert step.logprobs.rows.tolist() == list(range(len(step.token_ids)))
        assert list(driver.errors) == [1]


@pytest.mark.parametrize("num_steps", [0, 1])  # before another one's step fails
def test_a_prompts_log_probabilities_are_told_once_where_a_step_is_run_in_parts_or_again(num_steps: int) -> None:
    driver = CoreDriver(TellingRunner(vocab_size=VOCAB_SIZE, raising_token=RAISING), max_num_tokens=8)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    driver.core.add(AddSequence(sequence_id=0, prompt_token_ids=OTHERS[:12], params=params, num_scored=0))
    told: list[float] = []

    def step() -> None:
        scores = driver.core.step().prompt_logprobs
        told.extend([] if scores is None else scores.logprobs.tolist())

    for _ in range(num_steps):
        step()
    failing = AddSequence(sequence_id=1, prompt_token_ids=[RAISING], params=SamplingParams(), priority=-1)
    driver.core.add(failing)
    while driver.core.has_work():
        step()
    assert told == OTHERS[1:12]
