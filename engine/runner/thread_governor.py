"""How many threads a CPU's steps compute with: fewer while other processes hold cores, where fewer are faster.

Threads of one product wait for the one that another process keeps off its core. Which number is faster depends on the
load: on two shared cores a step's int8 products took 126 ms with two threads and 50 ms with one (8 rows of
SmolLM2-135M), and beside one more busy process 272 ms with two and 407 ms with one (64 rows). So it is tried, not
assumed. But a try costs: one of two threads less makes the steps of a trial twice as long. So fewer threads are tried
only while ours are held off for so much of the time that fewer could be faster, which what a worker's own parent and
Redis take is not. No result depends on the number of threads, which may change between two steps. Knows nothing of what
a step computes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.runner.run_delay import run_delay_seconds

WINDOW_STEPS = 16
# All threads together are held off for at least the time that each step loses by it. Giving up one thread in n can only
# pay where that is more than 1/n of the time; half of it, because a thread that comes late also finds its caches cold.
WORTH_A_TRIAL = 0.5
TRIAL_STEPS = 4  # with either number of threads, in turn
CLEAR_STEPS = 2  # the same, where every one of them speaks for the same number
MAX_TRIAL_STEPS = 64  # a trial ends undecided where steps of its size do not come
FASTER = 0.95  # of the time: less is no reason to change
MIN_WAIT_STEPS, MAX_WAIT_STEPS = 32, 2048  # between trials; twice as many after each that changed nothing


@dataclass(slots=True)
class _Trial:
    """Steps of one size, with two numbers of threads in turn; steps of another size are left as they were."""

    numbers: tuple[int, int]  # the present one, the other
    size: int
    seconds: dict[int, list[float]] = field(default_factory=dict)  # by number
    num_steps: int = 0  # of any size

    def number_for(self, size: int) -> int:
        num_taken = sum(map(len, self.seconds.values()))
        return self.numbers[num_taken % 2] if size == self.size else self.numbers[0]

    def take(self, number: int, size: int, seconds: float) -> None:
        self.num_steps += 1
        if size == self.size:
            self.seconds.setdefault(number, []).append(seconds)

    @property
    def is_over(self) -> bool:
        return self.num_steps >= MAX_TRIAL_STEPS or self.winner() is not None

    def winner(self) -> int | None:
        """The faster number; None: not known yet."""
        present, other = (self.seconds.get(number, []) for number in self.numbers)
        num_pairs = min(len(present), len(other))
        if num_pairs >= TRIAL_STEPS:
            return self.numbers[statistics.median(other) < FASTER * statistics.median(present)]
        if num_pairs >= CLEAR_STEPS and min(other) > max(present):
            return self.numbers[0]
        if num_pairs >= CLEAR_STEPS and max(other) < FASTER * min(present):
            return self.numbers[1]
        return None


class ThreadGovernor:
    """`begin` and `end` around every step, on one thread."""

    def __init__(
        self,
        max_threads: int,
        apply: Callable[[int], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        run_delay: Callable[[], float] = run_delay_seconds,
    ) -> None:
        """`apply` sets the number of threads; it is `max_threads` to begin with. `run_delay`: seconds so far for which
        others have kept our threads off their cores."""
        self._max_threads = max_threads
        self._apply = apply
        self._clock = clock
        self._run_delay = run_delay
        self._chosen = self._applied = max_threads
        self._trial: _Trial | None = None
        self._wait_steps = MIN_WAIT_STEPS
        self._num_steps = 0  # since the last trial
        self._run_delay_before = run_delay()
        self._window_seconds = 0.0  # of steps
        self._lost_share = 0.0  # of the last window's time, at most
        self._direction = -1  # of the next trial
        self._started = 0.0
        self._size = 0

    def begin(self, num_tokens: int) -> None:
        self._size = num_tokens.bit_length()
        number = self._chosen if self._trial is None else self._trial.number_for(self._size)
        if number != self._applied:
            self._apply(number)
            self._applied = number
        self._started = self._clock()

    def end(self) -> None:
        seconds = self._clock() - self._started
        self._num_steps += 1
        if self._trial is not None:
            self._trial.take(self._applied, self._size, seconds)
            if self._trial.is_over:
                self._decide(self._trial)
            return
        self._window_seconds += seconds
        if self._num_steps % WINDOW_STEPS == 0:
            run_delay = self._run_delay()
            self._lost_share = (run_delay - self._run_delay_before) / max(self._window_seconds, 1e-9)
            self._begin_window(run_delay)
            if self._num_steps >= self._wait_steps:
                self._try_another()

    def _begin_window(self, run_delay: float) -> None:
        self._run_delay_before = run_delay
        self._window_seconds = 0.0

    def _try_another(self) -> None:
        """Fewer or more while our threads are kept off their cores, by turns; else more, as far as we had them."""
        step = max(1, self._chosen // 8)
        is_crowded = self._lost_share > WORTH_A_TRIAL * step / self._chosen
        if not is_crowded or self._chosen == 1:
            self._direction = 1
        elif self._chosen == self._max_threads:
            self._direction = -1
        other = min(self._max_threads, max(1, self._chosen + self._direction * step))
        if other != self._chosen:
            self._trial = _Trial((self._chosen, other), self._size)

    def _decide(self, trial: _Trial) -> None:
        winner = trial.winner() or self._chosen
        has_changed = winner != self._chosen
        self._direction *= 1 if has_changed else -1
        self._wait_steps = MIN_WAIT_STEPS if has_changed else min(2 * self._wait_steps, MAX_WAIT_STEPS)
        self._chosen, self._trial, self._num_steps = winner, None, 0
        self._begin_window(self._run_delay())
