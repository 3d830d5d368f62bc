"""Fewer threads while cores are held by others and fewer are faster; all of them again once they are free."""

from collections.abc import Callable

from engine.runner.thread_governor import MAX_WAIT_STEPS, ThreadGovernor


class Machine:
    """Its steps take what `seconds_of(number of threads)` says, and its clock shows it."""

    def __init__(self, max_threads: int) -> None:
        self.num_threads = max_threads
        self.used: list[int] = []
        self.seconds = 0.0
        self.num_preemptions = 0
        self.governor = ThreadGovernor(
            max_threads, self._set, clock=lambda: self.seconds, preemptions=lambda: self.num_preemptions
        )

    def _set(self, number: int) -> None:
        self.num_threads = number

    def run(self, num_steps: int, seconds_of: Callable[[int], float], *, is_crowded: bool, sizes: int = 1) -> None:
        for i in range(num_steps):
            self.governor.begin(8 << (i % sizes))
            self.used.append(self.num_threads)
            self.seconds += seconds_of(self.num_threads)
            self.num_preemptions += 3 if is_crowded else 0
            self.governor.end()


def idle(number: int) -> float:
    return 1.0 / number


def crowded(number: int) -> float:
    return 1.0 if number == 1 else 2.5


def test_an_idle_machine_computes_with_all_threads_in_every_step() -> None:
    machine = Machine(2)
    machine.run(5000, idle, is_crowded=False)
    assert set(machine.used) == {2}


def test_fewer_threads_are_taken_where_they_are_faster_and_all_of_them_once_the_cores_are_free() -> None:
    machine = Machine(2)
    machine.run(100, crowded, is_crowded=True)
    assert machine.used[60:].count(1) > 30
    machine.run(5000, crowded, is_crowded=True)
    assert machine.used[-3000:].count(2) < 0.01 * 3000  # trials become rare
    machine.run(MAX_WAIT_STEPS + 100, idle, is_crowded=False)
    assert set(machine.used[-16:]) == {2}


def test_a_crowd_alone_changes_nothing_where_all_threads_are_faster() -> None:
    machine = Machine(2)
    machine.run(5000, idle, is_crowded=True)
    assert machine.used.count(1) < 0.02 * 5000  # trials alone
    assert machine.used[-1] == 2


def test_many_threads_give_way_step_by_step() -> None:
    machine = Machine(16)
    machine.run(2000, lambda number: 1.0 / number if number <= 12 else 1.0, is_crowded=True)
    machine.run(200, lambda number: 1.0 / number if number <= 12 else 1.0, is_crowded=True)
    assert min(machine.used[-50:]) >= 8 and max(machine.used[-50:]) <= 16
    assert machine.used.count(16) < 2200


def test_steps_of_other_sizes_are_not_compared() -> None:
    machine = Machine(2)
    machine.run(400, crowded, is_crowded=True, sizes=2)
    assert machine.used[-1] == 1
