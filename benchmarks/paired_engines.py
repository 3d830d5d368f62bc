"""Two engines that differ in one setting, in turns: what the setting changes, whatever else the machine does meanwhile.

Both are warm and compute the same slices of work, a second or two each, one directly after the other and in an order
that changes from slice to slice. Each pair has its own ratio, of seconds and of the CPU seconds of the engine's child,
which neighbours change less; what is reported is the median of the pairs, how sure it is, and where their middle half
lies.
"""

import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from benchmarks.process_figures import children, cpu_seconds
from engine import EngineConfig, InferenceEngine, SamplingParams

COLUMNS = ["off, tok/s", "on, tok/s", "off / on, seconds", "off / on, CPU seconds"]
PAIRED_NOTE = (
    "Medians of the pairs with their standard error, in brackets the middle half of the pairs (of few their range). "
    "CPU seconds are those of the engine's child."
)


@dataclass(frozen=True, slots=True)
class Work:
    """One slice; `num_counted` tokens make its speed."""

    prompts: list[list[int]]
    params: SamplingParams
    num_counted: int


@dataclass(frozen=True, slots=True)
class Slice:
    """What one engine took for some work."""

    seconds: float
    cpu_seconds: float
    token_ids: list[list[int]]


WorkT = TypeVar("WorkT", contravariant=True)
SliceT = TypeVar("SliceT", covariant=True)


class Contender(Protocol[WorkT, SliceT]):
    def measure(self, work: WorkT) -> SliceT: ...


def take_turns(contenders: Sequence[Contender[WorkT, SliceT]], works: Iterable[WorkT]) -> Iterator[list[SliceT]]:
    """What each took, in the contenders' order, for one work after the other; another one goes first each time."""
    for number, work in enumerate(works):
        first = number % len(contenders)
        order = [*range(first, len(contenders)), *range(first)]
        taken = {at: contenders[at].measure(work) for at in order}
        yield [taken[at] for at in range(len(contenders))]


@dataclass(frozen=True, slots=True)
class TimedEngine:
    """An engine, and the child of ours that computes for it."""

    engine: InferenceEngine
    child_pid: int

    def measure(self, work: Work) -> Slice:
        started, cpu_started = time.perf_counter(), cpu_seconds(self.child_pid)
        outputs = self.engine.generate_batch(work.prompts, work.params)
        seconds, cpu = time.perf_counter() - started, cpu_seconds(self.child_pid) - cpu_started
        if failed := [output.error for output in outputs if output.error]:
            raise SystemExit(f"a request failed: {failed[0]}")
        return Slice(seconds, cpu, [output.token_ids for output in outputs])


@dataclass(frozen=True, slots=True)
class PairedEngines:
    """Two engines whose outputs are to be the same."""

    off: TimedEngine
    on: TimedEngine

    @property
    def engine(self) -> InferenceEngine:
        """The one that has the setting."""
        return self.on.engine

    def race(self, works: Sequence[Work], *, name: str) -> list[str]:
        """A table's cells, as `COLUMNS` has them. Ends the run if the setting changes a token."""
        pairs: list[tuple[Slice, Slice]] = []
        for on, off in take_turns((self.on, self.off), works):
            if self.engine.info.is_batch_invariant and off.token_ids != on.token_ids:
                raise SystemExit(f"{name}: the setting changed an output")
            pairs.append((off, on))
        counts = [work.num_counted for work in works]
        speeds = [
            statistics.median(count / pair[side].seconds for count, pair in zip(counts, pairs, strict=True))
            for side in (0, 1)
        ]
        return [
            *(f"{speed:.0f}" for speed in speeds),
            describe([off.seconds / on.seconds for off, on in pairs]),
            describe([off.cpu_seconds / on.cpu_seconds for off, on in pairs]),
        ]


@contextmanager
def paired_engines(model: str, setting: str, *, off: Any, on: Any, **fields: Any) -> Iterator[PairedEngines]:
    """Start both."""
    with ExitStack() as stack:
        engines = [stack.enter_context(timed_engine(model, **{setting: value}, **fields)) for value in (off, on)]
        yield PairedEngines(*engines)


@contextmanager
def timed_engine(model: str, **fields: Any) -> Iterator[TimedEngine]:
    """Start one. On a CPU all its cores compute: how many threads do is not to depend on the neighbours."""
    before = set(children(os.getpid()))
    settings = {"num_threads": len(os.sched_getaffinity(0))} | fields
    with InferenceEngine(config=EngineConfig(model_path=model, **settings)) as engine:
        (child_pid,) = set(children(os.getpid())) - before
        yield TimedEngine(engine, child_pid)


def describe(ratios: Sequence[float]) -> str:
    """Their median with its standard error, and the middle half of them; of a few their range."""
    median = statistics.median(ratios)
    if len(ratios) < 4:
        return f"{median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    error = 0.93 * (high - low) / math.sqrt(len(ratios))  # 1.25 sigma / sqrt(n), sigma by the middle half
    return f"{median:.3f} ± {error:.3f} ({low:.3f} to {high:.3f})"
