"""How many threads a CPU's steps compute with: fewer while other processes hold cores, where fewer are faster.

Threads of one product wait for the one that another process keeps off its core. Which number is faster depends on the
load: on two shared cores a step's int8 products took 126 ms with two threads and 50 ms with one (8 rows of
SmolLM2-135M), and beside one more busy process 272 ms with two and 407 ms with one (64 rows). So it is tried, not
assumed. No result depends on the number of threads, which may change between two steps. Knows nothing of what a step
computes.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW_STEPS = 16
MIN_PREEMPTIONS = 8  # in a window, of all our threads: fewer are what an idle machine's own chores cause
TRIAL_STEPS = 4  # with either number of threads, in turn
MAX_TRIAL_STEPS = 64  # a trial ends undecided where steps differ too much to compare
FASTER = 0.95  # of the time: less is no reason to change
MIN_WAIT_STEPS, MAX_WAIT_STEPS = 32, 2048  # between trials; twice as many after each that changed nothing


def count_preemptions() -> int:
    """How often this process's threads were taken off their cores so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(slots=True)
class _Trial:
    """Steps of one size, with two numbers of threads in turn."""

    numbers: tuple[int, int]  # the present one, the other
    size: int
    seconds: dict[int, list[float]] = field(default_factory=dict)
    num_steps: int = 0

    @property
    def next_number(self) -> int:
        return self.numbers[self.num_steps % 2]

    @property
    def is_full(self) -> bool:
        return all(len(self.seconds.get(number, ())) >= TRIAL_STEPS for number in self.numbers)

    def take(self, number: int, size: int, seconds: float) -> None:
        self.num_steps += 1
        if size == self.size:
            self.seconds.setdefault(number, []).append(seconds)

    def winner(self) -> int:
        present, other = self.numbers
        is_faster = statistics.median(self.seconds[other]) < FASTER * statistics.median(self.seconds[present])
        return other if is_faster else present


class ThreadGovernor:
    """`begin` and `end` around every step, on one thread."""

    def __init__(
        self,
        max_threads: int,
        apply: Callable[[int], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        preemptions: Callable[[], int] = count_preemptions,
    ) -> None:
        """`apply` sets the number of threads; it is `max_threads` to begin with."""
        self._max_threads = max_threads
        self._apply = apply
        self._clock = clock
        self._preemptions = preemptions
        self._chosen = self._applied = max_threads
        self._trial: _Trial | None = None
        self._wait_steps = MIN_WAIT_STEPS
        self._num_steps = 0  # since the last trial
        self._preemptions_before = preemptions()
        self._is_crowded = False
        self._direction = -1  # of the next trial
        self._started = 0.0
        self._size = 0

    def begin(self, num_tokens: int) -> None:
        number = self._chosen if self._trial is None else self._trial.next_number
        if number != self._applied:
            self._apply(number)
            self._applied = number
        self._size = num_tokens.bit_length()
        self._started = self._clock()

    def end(self) -> None:
        seconds = self._clock() - self._started
        self._num_steps += 1
        if self._trial is not None:
            self._trial.take(self._applied, self._size, seconds)
            if self._trial.is_full or self._trial.num_steps >= MAX_TRIAL_STEPS:
                self._decide(self._trial)
            return
        if self._num_steps % WINDOW_STEPS == 0:
            preemptions = self._preemptions()
            self._is_crowded = preemptions - self._preemptions_before >= MIN_PREEMPTIONS
            self._preemptions_before = preemptions
            if self._num_steps >= self._wait_steps:
                self._try_another()

    def _try_another(self) -> None:
        """Fewer or more while our threads are kept off their cores, by turns; else more, as far as we had them."""
        step = max(1, self._chosen // 8)
        if not self._is_crowded or self._chosen == 1:
            self._direction = 1
        elif self._chosen == self._max_threads:
            self._direction = -1
        other = min(self._max_threads, max(1, self._chosen + self._direction * step))
        if other != self._chosen:
            self._trial = _Trial((self._chosen, other), self._size)

    def _decide(self, trial: _Trial) -> None:
        winner = trial.winner() if trial.is_full else self._chosen
        has_changed = winner != self._chosen
        self._direction *= 1 if has_changed else -1
        self._wait_steps = MIN_WAIT_STEPS if has_changed else min(2 * self._wait_steps, MAX_WAIT_STEPS)
        self._chosen, self._trial, self._num_steps = winner, None, 0
        self._preemptions_before = self._preemptions()
