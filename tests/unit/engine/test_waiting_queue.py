from math import inf

import numpy as np

from engine.finish_rule import FinishRule
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.waiting_queue import MAX_OVERTAKINGS, PROMOTED, WaitingQueue


def make(sequence_id: int, priority: int = 0, deadline: float = inf) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        params=SamplingParams(),
        choice_index=0,
        priority=priority,
        deadline=deadline,
        num_prompt_tokens=1,
        finish_rule=FinishRule(max_total_tokens=2, stop_token_ids=()),
        token_ids=np.zeros(1, np.int32),
    )


def admit_next(queue: WaitingQueue) -> int:
    head = queue.head()
    assert head is not None
    queue.admit(head)
    return head.sequence_id


def admit_all(queue: WaitingQueue) -> list[int]:
    order = []
    while len(queue):
        order.append(admit_next(queue))
    return order


def test_priority_goes_before_arrival() -> None:
    queue = WaitingQueue()
    for sequence_id, priority in [(0, 1), (1, 0), (2, 1), (3, -1), (4, 0)]:
        queue.push(make(sequence_id, priority))
    assert admit_all(queue) == [3, 1, 4, 0, 2]


def test_among_equal_priorities_the_earlier_deadline_goes_first_and_none_last() -> None:
    queue = WaitingQueue()
    for sequence_id, priority, deadline in [(0, 0, inf), (1, 0, 20.0), (2, 1, 1.0), (3, 0, 10.0), (4, 0, 20.0)]:
        queue.push(make(sequence_id, priority, deadline))
    assert admit_all(queue) == [3, 1, 4, 0, 2]


def test_the_promoted_go_by_arrival_whatever_their_deadlines() -> None:
    queue = WaitingQueue()
    promoted = [make(0, priority=9, deadline=200.0), make(1, priority=9, deadline=100.0)]
    for sequence in promoted:
        queue.push(sequence)
        queue._num_overtakings = MAX_OVERTAKINGS
        assert queue.head() is sequence and sequence.priority == PROMOTED
        queue.admit(sequence)
    for sequence in promoted:
        queue.push(sequence)
    assert admit_all(queue) == [0, 1]


def test_a_preempted_sequence_comes_back_to_its_own_place() -> None:
    queue = WaitingQueue()
    first = make(0)
    for sequence in (first, make(1), make(2)):
        queue.push(sequence)
    queue.admit(first)
    queue.push(first)
    assert admit_all(queue) == [0, 1, 2]


def test_removed_sequences_are_never_head_and_leave_no_heap_entries_behind() -> None:
    queue = WaitingQueue()
    for sequence_id in range(1000):
        queue.push(make(sequence_id, priority=sequence_id % 3))
    for sequence_id in range(990):
        assert queue.remove(sequence_id) is not None
    assert queue.remove(5) is None and 5 not in queue and 995 in queue and len(queue) == 10
    queue.push(make(1000))
    assert len(queue._by_urgency) == len(queue._by_arrival) == 11
    assert sorted(admit_all(queue)) == list(range(990, 1001))


def test_the_oldest_is_still_the_oldest_when_it_comes_back_behind_many_that_left() -> None:
    queue = WaitingQueue()
    for sequence_id in range(1, 200):
        queue.push(make(sequence_id))
    for sequence_id in range(1, 170):
        queue.remove(sequence_id)
    queue.push(make(0, priority=9))
    assert len(queue._by_arrival) == len(queue) == 31
    assert admit_all(queue).index(0) == MAX_OVERTAKINGS


def test_the_oldest_is_overtaken_a_bounded_number_of_times_in_a_row() -> None:
    queue = WaitingQueue()
    queue.push(make(0, priority=9))
    queue.push(make(1, priority=9))
    order = []
    for sequence_id in range(2, 60):
        queue.push(make(sequence_id, priority=0))
        order.append(admit_next(queue))
    assert order.index(0) == MAX_OVERTAKINGS
    assert order.index(1) == 2 * MAX_OVERTAKINGS + 1


def test_who_comes_after_the_oldest_was_overtaken_is_not_promoted_when_that_one_leaves() -> None:
    queue = WaitingQueue()
    queue.push(make(0, priority=9))
    for sequence_id in range(1, MAX_OVERTAKINGS + 1):
        queue.push(make(sequence_id, priority=0))
        assert admit_next(queue) == sequence_id
    queue.push(make(98, priority=9))
    queue.push(make(99, priority=0))
    queue.remove(0)
    assert admit_all(queue) == [99, 98]


def test_a_promoted_sequence_stays_the_most_urgent_when_it_comes_back() -> None:
    queue = WaitingQueue()
    oldest = make(0, priority=9)
    oldest.priority = PROMOTED
    queue.push(make(1, priority=-100))
    queue.push(oldest)
    assert admit_all(queue) == [0, 1]
