"""Blocks that sequences share: found in the prefix cache, or with the other choices of their request."""

from typing import Any

import pytest

from engine.waiting_queue import MAX_OVERTAKINGS
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output


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
    assert driver.cached_tokens == {}, "what it had computed itself was no hit of its prompt's"


def test_of_a_resumed_answer_what_is_found_behind_its_prompt_is_no_hit_of_the_prompts() -> None:
    driver = CoreDriver(FakeRunner(block_size=4))
    first = driver.add([1, 2, 3, 4, 5, 6], max_tokens=12)
    driver.run()
    resumed = driver.add([1, 2, 3, 4, 5, 6], max_tokens=12, output=driver.outputs[first][:9])
    driver.run()
    assert driver.cached_tokens == {resumed: 6} and driver.outputs[resumed] == driver.outputs[first]
    assert driver.core.get_stats().num_prompt_tokens == 6 + 3, "12 of 15 tokens were found"


def test_what_an_aborted_sequence_computed_serves_the_next_one() -> None:
    driver = CoreDriver(FakeRunner(block_size=4))
    prompt = list(range(13))
    aborted = driver.add(prompt, max_tokens=9)
    driver.step()
    driver.core.abort([aborted])
    again = driver.add(prompt, max_tokens=2)
    driver.run()
    assert driver.cached_tokens == {again: 12}


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


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_choice_that_takes_the_place_of_the_one_it_shares_with_computes_its_prompt_itself(
    prefix_caching: bool,
) -> None:
    runner = FakeRunner(block_size=4)
    driver = CoreDriver(runner, prefix_caching=prefix_caching, max_num_seqs=2)
    prompt = list(range(13))
    driver.add([1], max_tokens=1)
    choices = add_choices(driver, prompt, 2, max_tokens=40, priority=1)
    for num_overtakings in range(MAX_OVERTAKINGS):
        driver.step()
        driver.add([num_overtakings], max_tokens=1 if num_overtakings < MAX_OVERTAKINGS - 1 else 40)
    driver.run()
    assert driver.core.get_stats().num_preemptions > 0
    for choice, sequence_id in enumerate(choices):
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=40, choice=choice)
