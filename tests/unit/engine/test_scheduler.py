"""What a step computes, and how sequences come and go: a core over a fake runner."""

import random
from itertools import pairwise

import pytest

from engine.runner.batch_inputs import BatchInputs
from tests.fakes.core_driver import CoreDriver, random_prompt
from tests.fakes.fake_runner import FakeRunner, undisturbed_output


class Recording:
    """A runner's `on_execute` that keeps the shape of every step."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []
        self.query_lens: list[list[int]] = []

    def __call__(self, inputs: BatchInputs) -> None:
        self.num_tokens.append(inputs.num_tokens)
        starts = inputs.query_start.tolist()
        self.query_lens.append([end - start for start, end in pairwise(starts)])


def test_a_step_never_computes_more_than_the_budget_and_long_prompts_go_in_chunks() -> None:
    steps = Recording()
    driver = CoreDriver(FakeRunner(on_execute=steps), max_num_tokens=16)
    long = driver.add(random_prompt(random.Random(0), 60), max_tokens=3)
    driver.run()
    assert steps.num_tokens == [16, 16, 16, 12, 1, 1]
    assert len(driver.outputs[long]) == 3


def test_of_few_prompts_a_step_takes_few_tokens_and_of_many_as_many_as_ever() -> None:
    steps = Recording()
    rng = random.Random(0)
    runner = FakeRunner(num_blocks=256, few_prefill_tokens=32, on_execute=steps)
    driver = CoreDriver(runner, max_num_seqs=8, max_num_tokens=100)
    for _ in range(2):
        driver.add(random_prompt(rng, 40), max_tokens=1)
    driver.run()
    assert steps.query_lens == [[32], [8, 24], [16]]
    steps.query_lens.clear()
    for _ in range(8):
        driver.add(random_prompt(rng, 40), max_tokens=1)
    driver.run()
    # 8 prompts wait, then 6 (of which one has begun), then 4, then 2.
    assert list(map(sum, steps.query_lens)) == [100, 96, 64, 32, 28]


def test_running_decodes_get_a_token_in_every_step_beside_a_long_prefill() -> None:
    rng = random.Random(0)
    driver = CoreDriver(FakeRunner(), max_num_tokens=8)
    first = driver.add(random_prompt(rng, 4), max_tokens=30)
    driver.step()
    driver.add(random_prompt(rng, 100), max_tokens=2)
    for num_steps in range(2, 15):
        driver.step()
        assert len(driver.outputs[first]) == num_steps


@pytest.mark.parametrize("max_num_tokens", [4, 8, 32])
def test_prefills_hold_up_a_decode_by_one_step_of_the_budget_at_most(max_num_tokens: int) -> None:
    """The stated bound, in tokens computed between two of a running sequence; a step's time follows from them."""
    steps = Recording()
    rng = random.Random(0)
    driver = CoreDriver(FakeRunner(num_blocks=256, on_execute=steps), max_num_seqs=4, max_num_tokens=max_num_tokens)
    first = driver.add(random_prompt(rng, 3), max_tokens=60)
    driver.step()
    while first not in driver.finished:
        if driver.num_added < 20:
            driver.add(random_prompt(rng, rng.choice([1, 40, 100])), max_tokens=3)
        assert first in driver.step().sequence_ids
    assert max(steps.num_tokens) == max_num_tokens


def test_sequences_join_and_leave_at_every_step() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    short = driver.add([1, 2], max_tokens=2)
    long = driver.add([3], max_tokens=6)
    waiting = driver.add([4], max_tokens=1)
    driver.step()
    driver.step()
    assert short in driver.finished and waiting not in driver.finished
    driver.step()
    assert waiting in driver.finished and long not in driver.finished
    driver.run()
    assert driver.core.get_stats().num_preemptions == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_sequences_keep_their_output(prefix_caching: bool) -> None:
    rng = random.Random(3)
    runner = FakeRunner(num_blocks=12, block_size=4)
    driver = CoreDriver(runner, max_num_tokens=16, prefix_caching=prefix_caching)
    expected = {}
    for seed in range(12):
        prompt = random_prompt(rng, rng.randint(1, 12))
        expected[driver.add(prompt, max_tokens=20, seed=seed)] = undisturbed_output(
            runner.info, prompt, max_tokens=20, seed=seed
        )
    driver.run()
    assert driver.core.get_stats().num_preemptions > 0
    assert driver.outputs == expected


def test_an_aborted_sequence_frees_its_blocks_at_once_wherever_it_is() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2, max_num_tokens=8)
    decoding = driver.add([1, 2, 3], max_tokens=50)
    prefilling = driver.add([4] * 60, max_tokens=50)
    waiting = driver.add([5], max_tokens=50)
    driver.step()
    driver.core.abort([decoding, prefilling, waiting, 999])
    driver.core.check_integrity()
    assert not driver.core.has_work()
    assert driver.core.get_stats().num_kv_blocks_used == 0
    assert len(driver.step().sequence_ids) == 0


def test_ten_thousand_waiting_sequences_can_be_aborted_and_leave_nothing() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    ids = [driver.add([1], max_tokens=2, priority=i % 5) for i in range(10_000)]
    driver.step()
    driver.core.abort(ids[2:])
    driver.core.abort(ids[:2])
    assert not driver.core.has_work()
    last = driver.add([7], max_tokens=1)
    driver.run()
    assert last in driver.finished
