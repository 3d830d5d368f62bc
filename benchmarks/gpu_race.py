"""The engine on a GPU beside its peers, and behind the queue: the same prompts, one contender after the other."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cpu_peers import Contender, Ours, check
from benchmarks.peer_environment import PeerError, PeerProcess, spawn
from benchmarks.peer_process import Measurement
from benchmarks.queue_cost import WholePath
from benchmarks.worker_fixture import worker_process
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, SamplingParams
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence

HERE = Path(__file__).parent
# Peers by what must be installed: their scripts, on peer_process.py.
PEERS = {"transformers": "transformers_cpu_peer.py", "vllm": "vllm_peer.py", "sglang": "sglang_peer.py"}


@dataclass(frozen=True, slots=True)
class RaceSettings:
    """What every contender is started with."""

    folder: Path
    device: torch.device
    is_smoke: bool


class Queued:
    """`WholePath` as a contender."""

    def __init__(self, redis_url: str) -> None:
        self._path = WholePath(redis_url)

    def run(self, workload: Workload) -> Measurement:
        seconds, num_tokens = self._path.run(workload)
        return {"seconds": seconds, "counts": [num_tokens]}


@contextmanager
def ours(settings: RaceSettings) -> Iterator[Contender]:
    smoke = {"attention": "triton", "in_process": True, "num_kv_blocks": 64, "max_num_seqs": 4, "max_num_tokens": 32}
    options = smoke if settings.is_smoke else {"max_num_seqs": 512}
    with InferenceEngine(
        str(settings.folder), device=str(settings.device), dtype="bfloat16", prefix_caching=False, **options
    ) as engine:
        yield Ours(engine)


@contextmanager
def queued(settings: RaceSettings) -> Iterator[Contender]:
    """Behind a Redis on this host, every token stored and streamed."""
    arguments = ["--model", str(settings.folder), "--device", str(settings.device), "--dtype", "bfloat16"]
    arguments += ["--max-num-seqs", "4" if settings.is_smoke else "512"]
    with worker_process(*arguments) as (redis_url, _):
        yield Queued(redis_url)


@contextmanager
def peer(name: str, settings: RaceSettings) -> Iterator[Contender]:
    """Raises `PeerError` if it is not installed or does not start."""
    if importlib.util.find_spec(name) is None:
        raise PeerError("not installed in this environment")
    arguments = [str(settings.folder), *(["bfloat16", str(settings.device)] if name == "transformers" else [])]
    command = [sys.executable, str(HERE / PEERS[name]), *arguments]
    process = PeerProcess(spawn(command, os.environ | {"PYTHONPATH": str(HERE.parent)}))
    try:
        process.read()
        yield process
    finally:
        process.close()


def measure(contender: Contender, workloads: list[Workload], end_id: int) -> list[Measurement]:
    """One run of each workload, after a short one. Raises `PeerError` if tokens are missing."""
    contender.run(uniform_workload(2, (4, 8), (2, 3), seed=99, end_id=end_id))
    measurements = []
    for workload in workloads:
        measurement = contender.run(workload)
        check(measurement, workload)
        print(f"{sum(measurement['counts'])} tokens in {measurement['seconds']:.1f} s", file=sys.stderr)
        measurements.append(measurement)
    return measurements


def first_job_seconds(settings: RaceSettings) -> float:
    """From the start of an engine to the end of a short job, with whatever earlier starts left in caches."""
    start = time.perf_counter()
    with ours(settings) as contender:
        contender.run(Workload([[1, 2, 3]], [2]))
        return time.perf_counter() - start


def idle_share(settings: RaceSettings, num_seqs: int, end_id: int) -> float:
    """Of the time of 50 decode steps of `num_seqs` sequences, the part in which the device computed nothing."""
    config = EngineConfig(model_path=str(settings.folder), device=str(settings.device), max_num_seqs=num_seqs)
    core = EngineCore(config)
    workload = uniform_workload(num_seqs, (100, 400), (200, 200), seed=3, end_id=end_id)
    for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
        params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
    while core.get_stats().num_waiting or core.get_stats().num_steps < 60:  # graphs are captured by then
        core.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(50):
            core.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])
