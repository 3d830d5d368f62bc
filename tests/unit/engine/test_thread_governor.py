"""Fewer threads while cores are held by others and fewer are faster; all of them again once they are free."""

import hashlib
import os
import threading
from collections.abc import Callable

import pytest

from engine.runner import run_delay
from engine.runner.run_delay import run_delay_seconds
from engine.runner.thread_governor import CLEAR_STEPS, MAX_WAIT_STEPS, MIN_WAIT_STEPS, ThreadGovernor
from tests.fakes.waiting import wait_until


class Machine:
    """Its steps take what `seconds_of(number of threads)` says, and its clock shows it."""

    def __init__(self, max_threads: int) -> None:
        self.num_threads = max_threads
        self.used: list[int] = []
        self.seconds = 0.0
        self.run_delay_seconds = 0.0
        self.sizes: list[int] = []
        self.governor = ThreadGovernor(
            max_threads, self._set, clock=lambda: self.seconds, run_delay=lambda: self.run_delay_seconds
        )

    def _set(self, number: int) -> None:
        self.num_threads = number

    def run(self, num_steps: int, seconds_of: Callable[[int], float], *, run_delay: float, sizes: int = 1) -> None:
        """`run_delay`: for how much of the time a thread waits for its core."""
        for i in range(num_steps):
            self.governor.begin(8 << (i % sizes))
            self.used.append(self.num_threads)
            self.sizes.append(8 << (i % sizes))
            self.seconds += seconds_of(self.num_threads)
            self.run_delay_seconds += run_delay * seconds_of(self.num_threads)
            self.governor.end()


def idle(number: int) -> float:
    return 1.0 / number


def crowded(number: int) -> float:
    return 1.0 if number == 1 else 2.5


def test_an_idle_machine_computes_with_all_threads_in_every_step() -> None:
    machine = Machine(2)
    machine.run(5000, idle, run_delay=0.0)
    assert set(machine.used) == {2}


def test_fewer_threads_are_taken_where_they_are_faster_and_all_of_them_once_the_cores_are_free() -> None:
    machine = Machine(2)
    machine.run(100, crowded, run_delay=0.8)
    assert machine.used[60:].count(1) > 30
    machine.run(5000, crowded, run_delay=0.8)
    assert machine.used[-3000:].count(2) < 0.01 * 3000  # trials become rare
    machine.run(MAX_WAIT_STEPS + 100, idle, run_delay=0.0)
    assert set(machine.used[-16:]) == {2}


def test_a_crowd_alone_changes_nothing_where_all_threads_are_faster() -> None:
    machine = Machine(2)
    machine.run(5000, idle, run_delay=0.8)
    assert machine.used.count(1) < 0.02 * 5000  # trials alone
    assert machine.used[-1] == 2


def test_what_a_workers_own_parent_and_redis_take_of_two_cores_is_never_worth_a_trial() -> None:
    machine = Machine(2)
    machine.run(5000, idle, run_delay=0.2)
    assert set(machine.used) == {2}


def test_with_many_threads_a_smaller_loss_is_worth_a_trial() -> None:
    machine = Machine(16)
    machine.run(MIN_WAIT_STEPS + 2, idle, run_delay=0.2)
    assert set(machine.used) == {14, 16}


def test_a_trial_that_is_clear_ends_early() -> None:
    machine = Machine(2)
    machine.run(2 * MIN_WAIT_STEPS, idle, run_delay=0.8)
    assert machine.used.count(1) == CLEAR_STEPS


def test_steps_of_another_size_than_the_trials_are_computed_as_before() -> None:
    machine = Machine(2)
    machine.run(MIN_WAIT_STEPS, idle, run_delay=0.8)  # the trial is of steps of 8 tokens
    machine.run(30, idle, run_delay=0.8, sizes=8)
    assert {size for size, used in zip(machine.sizes, machine.used, strict=True) if used == 1} == {8}


def test_a_trial_whose_steps_do_not_come_ends_undecided() -> None:
    machine = Machine(2)
    machine.run(MIN_WAIT_STEPS, idle, run_delay=0.8)
    for _ in range(500):
        machine.governor.begin(512)
        assert machine.num_threads == 2
        machine.seconds += 1.0
        machine.governor.end()
    machine.run(8, crowded, run_delay=0.8)
    assert set(machine.used[-8:]) == {2}


def test_many_threads_give_way_step_by_step() -> None:
    machine = Machine(16)
    machine.run(2000, lambda number: 1.0 / number if number <= 12 else 1.0, run_delay=0.8)
    machine.run(200, lambda number: 1.0 / number if number <= 12 else 1.0, run_delay=0.8)
    assert min(machine.used[-50:]) >= 8 and max(machine.used[-50:]) <= 16
    assert machine.used.count(16) < 2200


def test_steps_of_other_sizes_are_not_compared() -> None:
    machine = Machine(2)
    machine.run(400, crowded, run_delay=0.8, sizes=2)
    assert machine.used[-1] == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel keeps no such figures")
def test_threads_that_share_a_core_are_run_delay() -> None:
    core, before, has_ended = min(os.sched_getaffinity(0)), run_delay_seconds(), threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {core})
        while not has_ended.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: run_delay_seconds() > before + 0.01)
    has_ended.set()
    for thread in threads:
        thread.join()


def test_a_system_that_tells_nothing_of_waiting_threads_is_asked_how_often_they_were_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_delay, "_run_delay", lambda thread: None)
    assert run_delay_seconds() >= 0.0
