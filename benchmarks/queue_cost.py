"""What the queue costs, and what continuous batching of transformers reaches, on the same prompts in one run.

Three contenders take turns: our engine alone (in its child process), the whole path (client → Redis → worker → stream
and result), and transformers' continuous batching. A round runs each once, on prompts that no round before it had, so
that no prefix cache helps; the medians are over rounds. A contender that produced another number of tokens than asked
for ends the run.

    python -m benchmarks.queue_cost [--rounds 3] [--num-prompts 64]
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import click

from benchmarks.report import print_and_keep
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, SamplingParams
from producer import AsyncClient, AsyncJob, Client
from worker.embedded_redis import EmbeddedRedis

MODEL = "smollm2-135m"


class Contender(Protocol):
    def run(self, workload: Workload) -> tuple[float, int]:
        """Seconds from the first prompt in to the last token out, and the number of tokens."""
        ...


class EngineAlone:
    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def run(self, workload: Workload) -> tuple[float, int]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in workload.max_tokens]
        start = time.perf_counter()
        outputs = self._engine.generate_batch(workload.prompts, params)
        return time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)


class WholePath:
    """Every job is watched by a subscriber of its own, as a service would watch it."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url

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

    def run(self, workload: Workload) -> tuple[float, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": workload.prompts, "max_tokens": workload.max_tokens}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        return reply["seconds"], reply["num_tokens"]


@contextmanager
def whole_path() -> Iterator[WholePath]:
    with EmbeddedRedis() as server:
        command = [sys.executable, "-m", "producer.cli", "worker", "--redis-url", server.url, "--model", MODEL]
        worker = subprocess.Popen(command)
        try:
            with Client(server.url) as client:
                while not client.workers():
                    if worker.poll() is not None:
                        raise SystemExit("the worker did not start")
                    time.sleep(0.1)
                yield WholePath(server.url)
        finally:
            worker.terminate()
            worker.wait()


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
        speeds = race(contenders, workloads)
    report(speeds, num_prompts, f"{info.dtype}, attention {info.attention}")


def race(contenders: dict[str, Contender], workloads: list[Workload]) -> dict[str, list[float]]:
    """Output tokens a second of each contender in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for workload in workloads:
        for name, contender in contenders.items():
            seconds, num_tokens = contender.run(workload)
            if num_tokens != workload.num_output_tokens:
                raise SystemExit(f"{name} produced {num_tokens} tokens instead of {workload.num_output_tokens}")
            speeds[name].append(num_tokens / seconds)
            print(f"{name}: {num_tokens} tokens in {seconds:.1f} s", file=sys.stderr)
    return speeds


def report(speeds: dict[str, list[float]], num_prompts: int, setting: str) -> None:
    rows = []
    for name, values in speeds.items():
        # Ratios round by round: the machine's speed drifts, and a round's contenders drift together.
        ratio = statistics.median(a / b for a, b in zip(values, speeds["engine alone"], strict=True))
        rows.append(
            [name, f"{statistics.median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{ratio:.2f}"]
        )
    notes = [
        f"SmolLM2-135M-Instruct, {setting}, {num_prompts} prompts U(32,256) → U(32,128) tokens, greedy, from the first "
        f"prompt in to the last token out, {len(speeds['engine alone'])} rounds, medians.",
        "The last column is the speed relative to the engine alone, the median over the rounds.",
    ]
    print_and_keep("queue_cost", ["contender", "output tokens/s", "min to max", "ratio"], rows, notes)


if __name__ == "__main__":
    main()
