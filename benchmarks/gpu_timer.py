"""Times work on one device; on CUDA as a graph of several calls, so that neither launches nor caches are measured."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FILL_SECONDS = 2e-3  # of a graph: long beside the gap before its first kernel
_MAX_CALLS = 64
_COLD_BYTES = 1 << 28  # several times a GPU's cache


@dataclass(frozen=True, slots=True)
class Timer:
    """`rounds`: samples of which the median is taken."""

    device: torch.device
    rounds: int

    def num_sets(self, num_bytes: int) -> int:
        """Sets of inputs of so many bytes to go round, so that none is in the device's cache when its turn comes."""
        return min(_MAX_CALLS, -(-_COLD_BYTES // num_bytes)) if self.device.type == "cuda" else 1

    def seconds(self, run: Callable[[int], object], num_sets: int = 1) -> float:
        """The median of a call, after one that compiles and warms up. run: is given the number of a set of inputs."""
        return self._graphed(run, num_sets) if self.device.type == "cuda" else self._plain(run)

    def _plain(self, run: Callable[[int], object]) -> float:
        run(0)
        samples = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run(0)
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def _graphed(self, run: Callable[[int], object], num_sets: int) -> float:
        run(0)
        once = self._event_seconds(lambda: run(0))
        num_calls = max(num_sets, min(_MAX_CALLS, int(_FILL_SECONDS / once) + 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(num_calls):
                run(i % num_sets)
        graph.replay()
        return statistics.median(self._event_seconds(graph.replay) for _ in range(self.rounds)) / num_calls

    def _event_seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
