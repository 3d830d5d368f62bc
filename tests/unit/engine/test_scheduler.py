"""The scheduler's rules, seen from outside: a core over a fake runner."""

import random
from itertools import pairwise
from typing import Any

import pytest

from engine.messages import FinishCode
from engine.runner.batch_inputs import BatchInputs
from engine.waiting_queue import MAX_OVERTAKINGS
from tests.fakes.core_driver import CoreDriver
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


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50) for _ in range(length)]


def test_a_step_never_computes_more_than_the_budget_and_long_prompts_go_in_chunks() -> None:
    steps = Recording()
    driver = CoreDriver(FakeRunner(on_execute=steps), max_num_tokens=16)
    long = driver.add(random_prompt(random.Random(0), 60), max_tokens=3)
    driver.run()
    assert steps.num_tokens == [16, 16, 16, 12, 1, 1]
    assert len(driver.outputs[long]) == 3


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


def test_the_youngest_is_preempted_when_blocks_run_out_and_the_oldest_never() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=6, block_size=4), max_num_tokens=16)
    oldest, middle, youngest = (driver.add([i] * 7, max_tokens=12) for i in range(3))
    driver.run()
    order = list(driver.finished)
    assert order == [oldest, middle, youngest]
    assert driver.core.get_stats().num_preemptions > 0


def test_a_lower_priority_is_preempted_before_a_younger_arrival() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=6, block_size=4), max_num_tokens=16)
    casual = driver.add([1] * 7, max_tokens=12, priority=5)
    urgent = driver.add([2] * 7, max_tokens=12, priority=0)
    later = driver.add([3] * 7, max_tokens=12, priority=0)
    driver.run()
    assert list(driver.finished) == [urgent, later, casual]


def test_a_waiting_urgent_sequence_preempts_a_less_urgent_one_for_its_slot() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=1)
    casual = driver.add([1, 2, 3], max_tokens=30, priority=1)
    driver.step()
    urgent = driver.add([4, 5, 6], max_tokens=3, priority=0)
    driver.step()
    assert len(driver.outputs[urgent]) == 1
    driver.run()
    assert list(driver.finished) == [urgent, casual]
    assert driver.core.get_stats().num_preemptions == 1


def test_a_waiting_urgent_sequence_preempts_less_urgent_ones_for_their_blocks() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=10, block_size=4), max_num_tokens=64)
    casual = [driver.add([i] * 12, max_tokens=8, priority=1) for i in range(3)]
    driver.step()
    urgent = driver.add([9] * 30, max_tokens=2, priority=0)
    driver.step()
    assert len(driver.outputs[urgent]) == 1
    driver.run()
    assert next(iter(driver.finished)) == urgent and set(driver.finished) == {urgent, *casual}


def test_nobody_is_preempted_for_an_urgent_sequence_that_would_not_fit_even_then() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=10, block_size=4), max_num_tokens=64)
    driver.add([1] * 24, max_tokens=8, priority=0)
    driver.add([2] * 8, max_tokens=8, priority=1)
    driver.step()
    driver.add([3] * 30, max_tokens=2, priority=0)
    driver.step()
    assert driver.core.get_stats().num_preemptions == 0
    driver.run()


def test_equal_priority_never_preempts_to_be_admitted() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=1)
    first = driver.add([1, 2, 3], max_tokens=10)
    driver.step()
    second = driver.add([4, 5, 6], max_tokens=3)
    driver.run()
    assert list(driver.finished) == [first, second]
    assert driver.core.get_stats().num_preemptions == 0


def test_an_earlier_deadline_preempts_a_later_one_and_none_of_equal_priority() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    never, late = driver.add([1], max_tokens=30), driver.add([2], max_tokens=30, deadline=2000.0)
    driver.step()
    soon = driver.add([3], max_tokens=30, deadline=1000.0)
    driver.step()
    assert len(driver.outputs[soon]) == 1 and len(driver.outputs[never]) == 1 and len(driver.outputs[late]) == 2
    sooner = driver.add([4], max_tokens=30, deadline=500.0)
    driver.step()
    assert len(driver.outputs[sooner]) == 1 and len(driver.outputs[late]) == 2 and len(driver.outputs[soon]) == 2
    driver.run()
    assert list(driver.finished) == [soon, sooner, late, never]


def test_priority_goes_before_any_deadline() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=1)
    urgent = driver.add([1], max_tokens=5, priority=0)
    driver.step()
    driver.add([2], max_tokens=5, priority=1, deadline=1.0)
    driver.run()
    assert next(iter(driver.finished)) == urgent and driver.core.get_stats().num_preemptions == 0


def test_no_deadline_finishes_under_an_endless_stream_of_nearer_ones() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    patient = driver.add([1, 2, 3], max_tokens=10)
    for num_steps in range(1000):
        driver.add([num_steps % 50], max_tokens=2, deadline=2000.0 - num_steps)
        driver.add([num_steps % 50, 1], max_tokens=2, deadline=2000.0 - num_steps)
        driver.step()
        if patient in driver.finished:
            break
    assert patient in driver.finished
    assert num_steps <= 2 * MAX_OVERTAKINGS + 20


def test_an_urgent_sequence_takes_the_budget_before_a_running_prefill_of_less_urgency() -> None:
    rng = random.Random(0)
    driver = CoreDriver(FakeRunner(), max_num_tokens=8)
    driver.add(random_prompt(rng, 100), max_tokens=2, priority=1)
    driver.step()
    urgent = driver.add(random_prompt(rng, 8), max_tokens=1, priority=0)
    driver.step()
    assert driver.finished == {urgent: FinishCode.LENGTH}


def test_a_low_priority_finishes_under_an_endless_stream_of_urgent_ones() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    casual = driver.add([1, 2, 3], max_tokens=10, priority=100)
    for num_steps in range(1000):
        driver.add([num_steps % 50], max_tokens=2, priority=0)
        driver.add([num_steps % 50, 1], max_tokens=2, priority=0)
        driver.step()
        if casual in driver.finished:
            break
    assert casual in driver.finished
    assert num_steps <= 2 * MAX_OVERTAKINGS + 20


def test_a_large_sequence_is_not_passed_over_by_small_ones_that_would_fit() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=8, block_size=4), max_num_tokens=32)
    driver.add([1] * 12, max_tokens=6)
    driver.step()
    large = driver.add([2] * 24, max_tokens=2)
    small = driver.add([3], max_tokens=2)
    driver.run()
    assert list(driver.finished).index(large) < list(driver.finished).index(small)


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


# prefix cache --------------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once_and_changes_no_output() -> None:
    runner = FakeRunner(block_size=4)
    driver = CoreDriver(runner)
    prefix = list(range(12))
    first = driver.add([*prefix, 20], max_tokens=4)
    driver.run()
    second = driver.add([*prefix, 30, 31], max_tokens=4)
    driver.run()
    assert driver.cached_tokens == {second: 12}
    for sequence_id, prompt in ((first, [*prefix, 20]), (second, [*prefix, 30, 31])):
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=4)
    stats = driver.core.get_stats()
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_kv_blocks_used) == (13 + 2, 12, 0)


def test_sequences_of_one_step_share_the_prefix_that_this_step_computes() -> None:
    runner = FakeRunner(block_size=4)
    driver = CoreDriver(runner, max_num_tokens=64)
    prefix = list(range(12))
    ids = [driver.add([*prefix, token], max_tokens=3) for token in (20, 30, 40)]
    driver.step()
    assert driver.core.get_stats().num_prompt_tokens == 13 + 1 + 1
    assert driver.core.get_stats().num_kv_blocks_used == 3 + 3
    driver.run()
    expected = [undisturbed_output(runner.info, [*prefix, token], max_tokens=3) for token in (20, 30, 40)]
    assert [driver.outputs[sequence_id] for sequence_id in ids] == expected


def test_at_least_one_token_of_a_prompt_that_is_wholly_cached_is_computed() -> None:
    driver = CoreDriver(FakeRunner(block_size=4))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    first = driver.add(prompt, max_tokens=2)
    driver.run()
    again = driver.add(prompt, max_tokens=2)
    driver.run()
    assert driver.cached_tokens == {again: 4}
    assert driver.outputs[first] == driver.outputs[again]


def test_generated_tokens_can_be_hit_by_the_next_turn_of_a_conversation() -> None:
    driver = CoreDriver(FakeRunner(block_size=4))
    prompt = [1, 2, 3, 4, 5]
    first = driver.add(prompt, max_tokens=8)
    driver.run()
    second = driver.add([*prompt, *driver.outputs[first], 9], max_tokens=2)
    driver.run()
    assert driver.cached_tokens == {second: 12}


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=1)
    driver.add(list(range(20)), max_tokens=30, priority=1)
    for _ in range(3):
        driver.step()
    computed = driver.core.get_stats().num_prompt_tokens
    driver.add([40], max_tokens=1, priority=0)
    driver.run()
    stats = driver.core.get_stats()
    assert stats.num_preemptions == 1
    assert stats.num_prompt_tokens - computed == 1 + 2, "the urgent prompt, and what lay in no full block"


def test_cached_blocks_are_given_up_when_their_room_is_needed() -> None:
    runner = FakeRunner(num_blocks=8, block_size=4)
    driver = CoreDriver(runner)
    for start in range(0, 40, 5):
        prompt = list(range(start, start + 5)) * 4
        sequence_id = driver.add(prompt, max_tokens=4)
        driver.run()
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=4)


def test_nothing_is_shared_with_caching_off() -> None:
    driver = CoreDriver(FakeRunner(block_size=4), prefix_caching=False)
    for _ in range(2):
        driver.add(list(range(13)), max_tokens=2)
        driver.run()
    assert not driver.cached_tokens
    assert driver.core.get_stats().num_prompt_tokens == 26 and driver.core.get_stats().num_kv_blocks_cached == 0


def test_sequences_of_different_cache_keys_share_nothing() -> None:
    driver = CoreDriver(FakeRunner(block_size=4))
    ids = [driver.add(list(range(13)), max_tokens=2, cache_key=key) for key in ("", "one", "two", "one")]
    driver.run()
    assert driver.cached_tokens == {ids[3]: 12}


# choices of one prompt -----------------------------------------------------------------------------------------------


def add_choices(driver: CoreDriver, prompt: list[int], n: int, **fields: Any) -> list[int]:
    return [driver.add(prompt, choice=choice, group=driver.num_added - choice, **fields) for choice in range(n)]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_tokens", [9, 64])
def test_choices_compute_their_prompt_once_and_hold_its_blocks_once(prefix_caching: bool, max_num_tokens: int) -> None:
    runner = FakeRunner(block_size=4)
    driver = CoreDriver(runner, prefix_caching=prefix_caching, max_num_tokens=max_num_tokens)
    prompt = list(range(30))
    ids = add_choices(driver, prompt, 4, max_tokens=6)
    while driver.core.get_stats().num_running < 4:
        driver.step()
    stats = driver.core.get_stats()
    assert stats.num_kv_blocks_used <= 7 + 4 * 2, "the full blocks of the prompt once, the rest for each"
    driver.run()
    assert driver.core.get_stats().num_prompt_tokens == 30 + 3 * 2
    for choice, sequence_id in enumerate(ids):
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=6, choice=choice)
    assert prefix_caching or driver.core.get_stats().num_kv_blocks_cached == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_urgent_choices_that_preempt_wait_for_the_first_of_them(prefix_caching: bool) -> None:
    runner = FakeRunner()
    driver = CoreDriver(runner, prefix_caching=prefix_caching, max_num_seqs=4, max_num_tokens=16)
    casual = [driver.add([i], max_tokens=40, priority=1) for i in range(4)]
    driver.step()
    urgent = add_choices(driver, [7] * 34, 4, max_tokens=3, priority=0)
    while not set(urgent) <= set(driver.finished):
        driver.step()
    assert not set(casual) & set(driver.finished)
    assert [driver.cached_tokens.get(sequence_id) for sequence_id in urgent] == [None, 32, 32, 32]
    driver.run()


def test_choices_of_two_requests_share_nothing_with_caching_off() -> None:
    driver = CoreDriver(FakeRunner(block_size=4), prefix_caching=False)
    for _ in range(2):
        add_choices(driver, list(range(13)), 2, max_tokens=4)
    driver.run()
    assert driver.core.get_stats().num_prompt_tokens == 2 * (13 + 1)


def test_choices_go_on_when_the_one_they_share_with_fails_or_is_aborted() -> None:
    runner = FakeRunner(block_size=4)
    driver = CoreDriver(runner, prefix_caching=False, max_num_tokens=8)
    prompt = list(range(30))
    first, second, third = add_choices(driver, prompt, 3, max_tokens=6)
    driver.step()
    driver.core.abort([first])
    driver.core.check_integrity()
    driver.run()
    for choice, sequence_id in ((1, second), (2, third)):
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=6, choice=choice)
