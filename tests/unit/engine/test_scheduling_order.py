"""Who goes first: priority, deadline, arrival; who makes room for whom, and that nobody starves."""

import random
from collections.abc import Callable
from typing import Any

from engine.messages import FinishCode
from engine.waiting_queue import MAX_OVERTAKINGS
from tests.fakes.core_driver import CoreDriver, random_prompt
from tests.fakes.fake_runner import FakeRunner


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


def test_a_block_for_every_fourth_running_sequence_is_left_when_one_is_admitted() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=10, block_size=4), max_num_tokens=64)
    running = [driver.add([i] * 5, max_tokens=30) for i in range(4)]
    driver.step()
    driver.add([9] * 5)
    driver.step()
    assert driver.core.get_stats().num_kv_blocks_free == 2, "as many as it needs"
    assert driver.core.get_stats().num_waiting == 1
    driver.core.abort(running[:1])
    driver.step()
    assert driver.core.get_stats().num_waiting == 0


def test_nobody_is_preempted_for_an_urgent_sequence_that_would_leave_no_reserve() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=11, block_size=4), max_num_tokens=64)
    driver.add([1] * 5, max_tokens=30, priority=2)
    driver.step()
    for first in range(2, 6):
        driver.add([first] * 5, max_tokens=30, priority=0)
    driver.step()
    assert driver.core.get_stats().num_running == 5
    driver.add([9] * 9, priority=1)
    driver.step()
    assert driver.core.get_stats().num_preemptions == 0 and driver.core.get_stats().num_running == 5


def test_a_more_urgent_sequence_keeps_its_place_where_a_victims_blocks_are_shared_and_do_not_come_free() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=8, block_size=4), max_num_tokens=64)
    shared = list(range(16))
    urgent = driver.add(shared, max_tokens=12, priority=0)
    driver.step()
    driver.add(shared, max_tokens=12, priority=2)
    driver.step()
    between = driver.add([40] * 20, max_tokens=2, priority=1)
    driver.step()
    assert driver.core.get_stats().num_preemptions == 1 and not driver.outputs[between]
    driver.run()
    assert list(driver.finished)[:2] == [urgent, between]


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


def finishes_under_an_endless_stream(driver: CoreDriver, patient: int, rivals: Callable[[int], dict[str, Any]]) -> None:
    """Two more come in every step, with `rivals(num_steps)`."""
    for num_steps in range(1000):
        driver.add([num_steps % 50], max_tokens=2, **rivals(num_steps))
        driver.add([num_steps % 50, 1], max_tokens=2, **rivals(num_steps))
        driver.step()
        if patient in driver.finished:
            break
    assert patient in driver.finished
    assert num_steps <= 2 * MAX_OVERTAKINGS + 20


def test_no_deadline_finishes_under_an_endless_stream_of_nearer_ones() -> None:
    driver = CoreDriver(FakeRunner(), max_num_seqs=2)
    patient = driver.add([1, 2, 3], max_tokens=10)
    finishes_under_an_endless_stream(driver, patient, lambda num_steps: {"deadline": 2000.0 - num_steps})


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
    finishes_under_an_endless_stream(driver, casual, lambda num_steps: {"priority": 0})


def test_a_large_sequence_is_not_passed_over_by_small_ones_that_would_fit() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=8, block_size=4), max_num_tokens=32)
    driver.add([1] * 12, max_tokens=6)
    driver.step()
    large = driver.add([2] * 24, max_tokens=2)
    small = driver.add([3], max_tokens=2)
    driver.run()
    assert list(driver.finished).index(large) < list(driver.finished).index(small)
