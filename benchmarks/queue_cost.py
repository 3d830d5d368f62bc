"""What the queue costs, and what continuous batching of transformers reaches, on the same prompts in one run.

Three contenders take turns: our engine alone (in its child process), the whole path (client → Redis → worker → stream
and result), and transformers' continuous batching. A round runs each once, in the reverse order every other time, on
prompts that no round before it had, so that no prefix cache helps; the medians are over rounds. A contender that
produced another number of tokens than asked for ends the run.

A clock measures the machine, too. So the CPU time of each process is told beside it: what is neither the engine's
child's nor the clients' is the queue's, and on a small machine it is taken from the child.

    python -m benchmarks.queue_cost [--rounds 3] [--num-prompts 64]
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import click
import redis

from benchmarks.process_figures import children, cpu_seconds
from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import worker_process
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, SamplingParams
from producer import AsyncClient, AsyncJob

MODEL = "smollm2-135m"


ROLES = ("engine child", "parent", "Redis", "clients")


@dataclass(frozen=True, slots=True)
class Run:
    num_tokens: int
    seconds: float
    cpu: dict[str, float]  # seconds by process

    def cpu_per_1000(self, role: str) -> float:
        """Seconds for 1,000 output tokens."""
        return 1000 * self.cpu.get(role, 0.0) / self.num_tokens


class Contender(Protocol):
    processes: dict[str, int]
    """Ids by what they are, for CPU times."""

    def run(self, workload: Workload) -> tuple[float, int]:
        """Seconds from the first prompt in to the last token out, and the number of tokens."""
        ...


class EngineAlone:
    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        (child,) = children(os.getpid())
        self.processes = {"parent": os.getpid(), "engine child": child}

    def run(self, workload: Workload) -> tuple[float, int]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in workload.max_tokens]
        start = time.perf_counter()
        outputs = self._engine.generate_batch(workload.prompts, params)
        return time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)


class WholePath:
    """Every job is watched by a subscriber of its own, as a service would watch it."""

    def __init__(self, redis_url: str, processes: dict[str, int] | None = None) -> None:
        self._redis_url = redis_url
        self.processes = processes or {}

    def run(self, workload: Workload) -> tuple[float, int]:
        fields = {"temperature": 0.0, "ignore_eos": True}
        requests = [
            {"prompt": prompt, "max_tokens": n, **fields}
            for prompt, n in zip(workload.prompts, workload.max_tokens, strict=True)
        ]
        return asyncio.run(self._submit_and_watch(requests))

    async def _submit_and_watch(self, requests: list[dict[str, Any]]) -> tuple[float, int]:
        async with AsyncClient(self._redis_url) as client:
            start = time.perf_counter()
            jobs = await client.submit_many(requests)
            counts = await asyncio.gather(*map(count_streamed_tokens, jobs))
            results = [await job.result(timeout=60) for job in jobs]
            seconds = time.perf_counter() - start
        if counts != [len(result.choices[0].token_ids) for result in results]:
            raise SystemExit("the streams and the results differ")
        return seconds, sum(counts)


async def count_streamed_tokens(job: AsyncJob) -> int:
    return sum([len(chunk.token_ids) async for chunk in job.stream()])


class TransformersPeer:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.processes = {"engine child": process.pid}

    def run(self, workload: Workload) -> tuple[float, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": workload.prompts, "max_tokens": workload.max_tokens}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        return reply["seconds"], reply["num_tokens"]


@contextmanager
def whole_path() -> Iterator[WholePath]:
    with worker_process("--model", MODEL) as (url, worker), redis.Redis.from_url(url) as connection:
        (child,) = children(worker.pid)
        redis_pid = int(connection.info("server")["process_id"])
        yield WholePath(url, {"clients": os.getpid(), "parent": worker.pid, "engine child": child, "Redis": redis_pid})


@contextmanager
def transformers_peer(model_dir: str, dtype: str, num_blocks: int) -> Iterator[TransformersPeer]:
    command = [sys.executable, "-m", "benchmarks.transformers_peer", model_dir, dtype, str(num_blocks)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()
        yield TransformersPeer(process)
    finally:
        process.stdin.close()
        process.wait()


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--peer/--no-peer", default=True, show_default=True, help="Run transformers' continuous batching too.")
def main(rounds: int, num_prompts: int, peer: bool) -> None:
    workloads = [uniform_workload(num_prompts, (32, 256), (32, 128), seed=seed) for seed in range(rounds)]
    warmup = uniform_workload(4, (32, 64), (8, 16), seed=rounds)
    with ExitStack() as stack:
        engine = stack.enter_context(InferenceEngine(MODEL))
        info = engine.info
        contenders: dict[str, Contender] = {
            "engine alone": EngineAlone(engine),
            "whole path": stack.enter_context(whole_path()),
        }
        if peer:
            num_tokens = max(workload.num_prompt_tokens + workload.num_output_tokens for workload in workloads)
            num_blocks = num_tokens // 16 + 2 * num_prompts
            contenders["transformers continuous batching"] = stack.enter_context(
                transformers_peer(info.model_dir, info.dtype, num_blocks)
            )
        for contender in contenders.values():
            contender.run(warmup)
        runs = race(contenders, workloads)
    report(runs, num_prompts, f"{info.dtype}, attention {info.attention}")


def race(contenders: dict[str, Contender], workloads: list[Workload]) -> dict[str, list[Run]]:
    """The runs of each contender, one a round."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number, workload in enumerate(workloads):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            contender = contenders[name]
            before = {role: cpu_seconds(pid) for role, pid in contender.processes.items()}
            seconds, num_tokens = contender.run(workload)
            cpu = {role: cpu_seconds(pid) - before[role] for role, pid in contender.processes.items()}
            if num_tokens != workload.num_output_tokens:
                raise SystemExit(f"{name} produced {num_tokens} tokens instead of {workload.num_output_tokens}")
            runs[name].append(Run(num_tokens, seconds, cpu))
            print(f"{name}: {num_tokens} tokens in {seconds:.1f} s", file=sys.stderr)
    return runs


def report(runs: dict[str, list[Run]], num_prompts: int, setting: str) -> None:
    alone = runs["engine alone"]
    rows = []
    for name, own in runs.items():
        speeds = [run.num_tokens / run.seconds for run in own]
        # Ratios round by round: the machine's speed drifts, and a round's contenders drift together.
        ratio = statistics.median(other.seconds / run.seconds for run, other in zip(own, alone, strict=True))
        cells = [f"{statistics.median(run.cpu_per_1000(role) for run in own):.2f}" for role in ROLES]
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        rows.append([name, f"{statistics.median(speeds):.0f}", spread, f"{ratio:.2f}", *cells])
    notes = [
        f"SmolLM2-135M-Instruct, {setting}, {num_prompts} prompts U(32,256) → U(32,128) tokens, greedy, from the first "
        f"prompt in to the last token out, {len(alone)} rounds, medians.",
        "Ratio: the speed relative to the engine alone, the median over the rounds.",
        "The last columns are seconds of CPU for 1,000 output tokens. The clients are one process, in which every job "
        "has a subscriber of its own; the engine's parent is that process where the engine runs alone.",
    ]
    columns = ["contender", "output tokens/s", "min to max", "ratio", *ROLES]
    print_and_keep("queue_cost", columns, rows, notes)


if __name__ == "__main__":
    main()
