"""What this machine allows SmolLM2-135M: the time that matrix products take, and that memory takes to hand the weights
over; the longer of both bounds a run from below."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.workload import Workload

# Multiply-adds a token: the layers' for every token, the output layer's for a sampled one.
LAYER_WEIGHTS = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536)
OUTPUT_WEIGHTS = 49_152 * 576


@dataclass(frozen=True, slots=True)
class Bound:
    """Rates of this machine, both measured, in one number format."""

    flops_per_second: float
    bytes_per_second: float
    bytes_per_weight: int

    def seconds(self, workload: Workload) -> float:
        return max(flops(workload) / self.flops_per_second, self.weight_bytes(workload) / self.bytes_per_second)

    def weight_bytes(self, workload: Workload) -> float:
        """Every step reads all weights, and there are as many steps as the longest output has tokens."""
        return max(workload.max_tokens) * (LAYER_WEIGHTS + OUTPUT_WEIGHTS) * float(self.bytes_per_weight)

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e9:.0f} GFLOP/s, {self.bytes_per_second / 1e9:.1f} GB/s"


def flops(workload: Workload) -> float:
    """Of the matrix products: every token but a prompt's last output passes the layers, every output was sampled."""
    num_tokens = workload.num_prompt_tokens + workload.num_output_tokens - len(workload.prompts)
    return 2.0 * (LAYER_WEIGHTS * num_tokens + OUTPUT_WEIGHTS * workload.num_output_tokens)


def measure_bound(dtype: torch.dtype) -> Bound:
    """A large matrix product, and the sum of an array larger than all caches, on all cores; the best of several."""
    a, b = torch.randn(2, 1536, 1536).to(dtype)
    numbers = torch.ones(1 << 26)
    product = best_seconds(lambda: torch.mm(a, b))
    reading = best_seconds(numbers.sum)
    return Bound(2 * 1536**3 / product, numbers.nbytes / reading, dtype.itemsize)


def best_seconds(work: Callable[[], object], num_runs: int = 7) -> float:
    best = float("inf")
    for _ in range(num_runs):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
