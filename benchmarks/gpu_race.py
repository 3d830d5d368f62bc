"""The engine on a GPU beside its peers, and behind the queue: the same prompts, one contender after the other."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from benchmarks.cpu_peers import Contender, Ours, check
from benchmarks.peer_environment import LOAD_SECONDS, PeerError, PeerProcess, spawn
from benchmarks.peer_process import Measurement
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, SamplingParams
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from tests.fakes.child_thread import ChildThread

if TYPE_CHECKING:
    from producer.contract import Result

HERE = Path(__file__).parent
# Peers by what must be installed: their scripts, on peer_process.py.
PEERS = {"transformers": "transformers_peer.py", "vllm": "vllm_peer.py", "sglang": "sglang_peer.py"}


_LONG_RUN = 60.0  # seconds: a run has long warmed up by its end, and three of them would take a stage's time
_PROFILED = 50  # steps
_HOST_GAP = 10.0  # microseconds; from one kernel of a graph to the next it is about one


@dataclass(frozen=True, slots=True)
class RaceSettings:
    """What every contender is started with."""

    folder: Path
    device: torch.device
    is_smoke: bool


class OursOnGpu(Ours):
    @property
    def step_tokens(self) -> int | None:
        """Tokens of a step, if they were measured."""
        return self._engine.info.step_tokens


class Queued:
    """The whole path through a queue as a contender."""

    def __init__(self, run: "Callable[[Workload], tuple[float, list[Result]]]") -> None:
        self._run = run

    def run(self, workload: Workload) -> Measurement:
        seconds, results = self._run(workload)
        return {"seconds": seconds, "counts": [sum(len(result.choices[0].token_ids) for result in results)]}


@contextmanager
def ours(settings: RaceSettings, **more: object) -> Iterator[Contender]:
    smoke: dict[str, object] = {
        "_start_child": ChildThread,
        "num_kv_blocks": 64,
        "max_num_seqs": 4,
        "max_num_tokens": 32,
    }
    # Greedy tokens of random weights run in circles, which prompt lookup would guess.
    options: dict[str, object] = {"device": str(settings.device), "dtype": "bfloat16", "prefix_caching": False}
    options |= {"attention": "triton", "prompt_lookup": "off"} | (smoke if settings.is_smoke else {"max_num_seqs": 512})
    with InferenceEngine(str(settings.folder), **options | more) as engine:  # type: ignore[arg-type]
        yield OursOnGpu(engine)


@contextmanager
def queued(settings: RaceSettings) -> Iterator[Contender]:
    """Behind a Redis on this host, every token stored and streamed to a reader that only counts: 256 readers in one
    process of Python would be slower than the worker. Raises `PeerError` without the queue's packages.
    """
    try:
        from benchmarks.queue_ways import ReadElsewhere
        from benchmarks.worker_fixture import worker_process
        from producer import Client
    except ImportError as error:
        raise PeerError(f"the queue needs packages that are not here: {error}") from None
    arguments = ["--model", str(settings.folder), "--device", str(settings.device), "--dtype", "bfloat16"]
    arguments += ["--max-num-seqs", "4" if settings.is_smoke else "512", "--no-prefix-caching"]
    with worker_process(*arguments) as (redis_url, _), Client(redis_url) as client:
        yield Queued(ReadElsewhere(client, urlsplit(redis_url).port or 0).run_jobs)


@contextmanager
def peer(name: str, settings: RaceSettings) -> Iterator[Contender]:
    """Raises `PeerError` if it is not installed or does not start."""
    if importlib.util.find_spec(name) is None:
        raise PeerError("not installed in this environment")
    arguments = [str(settings.folder), *(["bfloat16", str(settings.device)] if name == "transformers" else [])]
    command = [sys.executable, str(HERE / PEERS[name]), *arguments]
    process = PeerProcess(spawn(command))
    try:
        process.read(LOAD_SECONDS)
        yield process
    finally:
        process.close()


def measure(
    contender: Contender, workloads: list[Workload], end_id: int, *, num_runs: int = 3
) -> Iterator[tuple[Measurement, float]]:
    """The last run of each workload, and the seconds of the first, in which kernels are compiled and graphs captured.

    A long one is the last. Raises `PeerError` if tokens are missing.
    """
    contender.run(uniform_workload(2, (4, 8), (2, 3), seed=99, end_id=end_id))
    for workload in workloads:
        runs: list[Measurement] = []
        while len(runs) < num_runs and (not runs or runs[-1]["seconds"] < _LONG_RUN):
            runs.append(contender.run(workload))
            check(runs[-1], workload)
        print(f"{workload.num_output_tokens} tokens in {runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        yield runs[-1], runs[0]["seconds"]


def first_job_seconds(settings: RaceSettings) -> float:
    """From the start of an engine to the end of a short job, with whatever earlier starts left in caches."""
    start = time.perf_counter()
    with ours(settings) as contender:
        contender.run(Workload([[1, 2, 3]], [2]))
        return time.perf_counter() - start


def core_config(settings: RaceSettings, num_seqs: int) -> EngineConfig:
    """Of a core in this process."""
    options: dict[str, Any] = {"num_kv_blocks": 64, "max_num_tokens": 32} if settings.is_smoke else {}
    return EngineConfig(
        model_path=str(settings.folder),
        device=str(settings.device),
        attention="triton",
        max_num_seqs=num_seqs,
        prefix_caching=False,
        **options,
    )


@dataclass(frozen=True, slots=True)
class StepProfile:
    """What a profiler saw of decode steps."""

    seconds: float  # of a step
    idle: float  # the part of the time in which nothing was computed
    by_host: float  # the part of it that lies in gaps which a host makes alone
    kernels: list[tuple[str, float, float]]  # name, launches a step and seconds a step; those that take longest first


def profile_steps(settings: RaceSettings, num_seqs: int, end_id: int) -> StepProfile:
    """50 decode steps of `num_seqs` sequences of the race's lengths."""
    core = EngineCore(core_config(settings, num_seqs))
    workload = uniform_workload(num_seqs, (100, 1024), (400, 400), seed=3, end_id=end_id)
    for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
        params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
    while core.get_stats().num_waiting:
        core.step()
    for _ in range(40):  # graphs are captured by then
        core.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            core.step()
        torch.cuda.synchronize()
    events = [
        event
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    ]
    if not events:
        raise PeerError("the profiler saw no kernels on the device")
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
    kernels = [(name, len(each) / _PROFILED, sum(each) / _PROFILED / 1e6) for name, each in by_name.items()]
    kernels.sort(key=lambda kernel: -kernel[2])
    return StepProfile((end - begin) / _PROFILED / 1e6, *gap_shares(spans), kernels)


def gap_shares(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the time that spans of microseconds cover, the part between them, and that of gaps that a host makes alone."""
    spans = sorted(spans)
    begin = reached = spans[0][0]
    gaps = []
    for start, end in spans:
        gaps.append(max(0.0, start - reached))
        reached = max(reached, end)
    return sum(gaps) / (reached - begin), sum(gap for gap in gaps if gap > _HOST_GAP) / (reached - begin)
