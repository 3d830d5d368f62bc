"""What a new worker's first run waits for that later ones do not: kernels to be compiled, graphs to be captured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from benchmarks.gpu_race import RaceSettings, core_config
from benchmarks.workload import Workload
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.runner.cuda_graphs import CudaCapture
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams


@dataclass(slots=True)
class Compiled:
    """Triton's kernels, as they were needed."""

    num_found: int = 0  # in its cache on disk
    num_compiled: int = 0
    seconds: float = 0.0  # of both

    def __str__(self) -> str:
        return f"{self.num_compiled} kernels compiled and {self.num_found} found on disk in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Captured:
    """CUDA graphs so far, of steps and draws."""

    num_graphs: int = 0
    seconds: float = 0.0
    num_bytes: int = 0

    @classmethod
    def by(cls, runner: ModelRunner) -> "Captured":
        capture = None if runner.graphs is None else runner.graphs.capture
        if not isinstance(capture, CudaCapture):
            return cls()
        return cls(capture.num_captured, capture.seconds, capture.num_bytes)

    def since(self, earlier: "Captured") -> str:
        num_graphs, seconds = self.num_graphs - earlier.num_graphs, self.seconds - earlier.seconds
        num_bytes = self.num_bytes - earlier.num_bytes
        return f"{num_graphs} graphs captured in {seconds:.1f} s, of {num_bytes / 2**20:.0f} MiB"


def first_runs(settings: RaceSettings, workload: Workload) -> Iterator[str]:
    """In words: the start, and the workload twice."""
    begun, nothing = time.perf_counter(), Captured()
    config = core_config(settings, len(workload.prompts))
    with compilations() as compiled:
        runner = ModelRunner(config)
        core = EngineCore(config, runner=runner)
    before = Captured.by(runner)
    yield f"the start took {time.perf_counter() - begun:.1f} s: {compiled}, {before.since(nothing)}"
    for name in ("the first run", "the second"):
        with compilations() as compiled:
            seconds = run(core, workload)
        captured = Captured.by(runner)
        yield f"{name} took {seconds:.1f} s: {compiled}, {captured.since(before)}"
        before = captured


def run(core: EngineCore, workload: Workload) -> float:
    """Seconds of the workload alone."""
    for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
        params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
    begun = time.perf_counter()
    while core.has_work():
        core.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@contextmanager
def compilations() -> Iterator[Compiled]:
    """Counts what Triton compiles meanwhile."""
    compiled = Compiled()

    def note(*, times: Any, cache_hit: bool, **rest: object) -> None:
        compiled.num_found += cache_hit
        compiled.num_compiled += not cache_hit
        compiled.seconds += times.total / 1e6

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = note
        yield compiled
