"""What the queue costs: a worker's jobs by way of Redis, beside the same work given to its engine directly.

Three ways take turns over slices of work, 64 prompts at once in each:
- the engine alone: `generate_batch` in the worker's process, past the queue (`shortcut_worker.py`);
- the whole path, read elsewhere: client → Redis → worker → stream and result, where every job's stream arrives here,
  but nobody looks at it before the time is taken, as if the clients had machines of their own;
- the whole path: the same, with an `AsyncClient`'s subscription to every job and its result on this machine.

One child computes all of them: same process, prompts, threads. No way finds another's prompts in a prefix cache, which
is off. Each slice of the second and third has its own ratio to the first, measured next to it within seconds; what is
reported is the median of the ratios and how sure it is. A way that gives another token than the first ends the run.

    python -m benchmarks.queue_cost [--slices 16] [--num-prompts 64] [--shorter 4]
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import click
import redis

from benchmarks.paired_engines import Contender, describe, take_turns
from benchmarks.process_figures import children, cpu_seconds
from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import worker_process
from benchmarks.workload import Workload, uniform_workload
from producer import AsyncClient, AsyncJob, Client
from producer.contract import Result, keys

MODEL = "smollm2-135m"
PROMPT_RANGE, OUTPUT_RANGE = (32, 256), (32, 128)
ROLES = ("engine child", "parent", "Redis", "clients")
IDLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Slice:
    """What one way took for some work."""

    seconds: float
    cpu: dict[str, float]  # seconds by role
    token_ids: list[list[int]]

    def cpu_seconds(self, *roles: str) -> float:
        return sum(self.cpu[role] for role in roles)


class EngineAlone:
    def __init__(self, worker: "subprocess.Popen[bytes]") -> None:
        self._worker = worker

    def measure(self, work: Workload) -> Slice:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        request = {"prompts": work.prompts, "max_tokens": work.max_tokens}
        self._worker.stdin.write(json.dumps(request).encode() + b"\n")
        self._worker.stdin.flush()
        reply = json.loads(self._worker.stdout.readline())
        cpu = {"engine child": reply["child"], "parent": reply["parent"], "Redis": 0.0, "clients": 0.0}
        return Slice(reply["seconds"], cpu, reply["token_ids"])


class QueuedWay:
    """A way through Redis; `run` gives the seconds from the first prompt in to the last result out, and the results."""

    def __init__(self, run: Callable[[Workload], tuple[float, list[Result]]], processes: dict[str, int]) -> None:
        self._run = run
        self._processes = processes

    def measure(self, work: Workload) -> Slice:
        before = self._cpu_seconds()
        seconds, results = self._run(work)
        after = self._cpu_seconds()
        cpu = {role: after[role] - before[role] for role in after}
        return Slice(seconds, cpu, [result.choices[0].token_ids for result in results])

    def _cpu_seconds(self) -> dict[str, float]:
        return {role: cpu_seconds(pid) for role, pid in self._processes.items()}


class WholePath:
    """Every job is watched by a subscriber of its own, as a service would watch it. `close()` it."""

    def __init__(self, redis_url: str) -> None:
        self._client = AsyncClient(redis_url)
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def run(self, workload: Workload) -> tuple[float, int]:
        """Seconds from the first prompt in to the last result out, and the number of tokens."""
        seconds, results = self.run_jobs(workload)
        return seconds, sum(len(result.choices[0].token_ids) for result in results)

    def run_jobs(self, workload: Workload) -> tuple[float, list[Result]]:
        return self._runner.run(self._submit_and_watch(requests_of(workload)))

    async def _submit_and_watch(self, requests: list[dict[str, Any]]) -> tuple[float, list[Result]]:
        start = time.perf_counter()
        jobs = await self._client.submit_many(requests)
        streamed = await asyncio.gather(*map(streamed_tokens, jobs))
        results = [await job.result(timeout=60) for job in jobs]
        seconds = time.perf_counter() - start
        if streamed != [result.choices[0].token_ids for result in results]:
            raise SystemExit("the streams and the results differ")
        return seconds, results


async def streamed_tokens(job: AsyncJob) -> list[int]:
    return [token_id async for chunk in job.stream() for token_id in chunk.token_ids]


class ReadElsewhere:
    """The streams and results lines of all jobs arrive on a socket; only the ends of jobs are counted."""

    def __init__(self, client: Client, port: int) -> None:
        self._client = client
        self._port = port

    def run_jobs(self, workload: Workload) -> tuple[float, list[Result]]:
        requests = requests_of(workload)
        job_ids = [f"slice-{os.urandom(8).hex()}-{number}" for number in range(len(requests))]
        channels = [*map(keys.stream_key, job_ids), keys.results_channel(self._client.settings.queue)]
        with socket.create_connection(("127.0.0.1", self._port)) as reader:
            reader.sendall(command("SUBSCRIBE", *channels))
            start = time.perf_counter()
            jobs = self._client.submit_many(requests, job_ids=job_ids)
            wait_for_ends(reader, len(jobs))
            seconds = time.perf_counter() - start
        return seconds, [job.result(timeout=60) for job in jobs]


def wait_for_ends(reader: socket.socket, num_jobs: int) -> None:
    """Until every job has its done entry and its results line."""
    num_messages, tail = 0, b""
    while num_messages < 2 * num_jobs:
        data = reader.recv(1 << 20)
        if not data:
            raise SystemExit("Redis closed the connection")
        for mark in (b'"done":true', b'"timings":{'):
            num_messages += (tail + data).count(mark) - tail.count(mark)
        tail = (tail + data)[-16:]


def command(*parts: str) -> bytes:
    """As Redis reads it."""
    return f"*{len(parts)}\r\n".encode() + b"".join(f"${len(part)}\r\n{part}\r\n".encode() for part in parts)


def requests_of(workload: Workload) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "max_tokens": n, "temperature": 0.0, "ignore_eos": True}
        for prompt, n in zip(workload.prompts, workload.max_tokens, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Ways:
    """All of them, on one worker."""

    contenders: dict[str, Contender[Workload, Slice]]
    processes: dict[str, int]

    def idle_cpu(self) -> float:
        """CPU seconds a second of a worker that has nothing to do, and its Redis."""
        before = [cpu_seconds(self.processes[role]) for role in ROLES[:3]]
        time.sleep(IDLE_SECONDS)
        after = [cpu_seconds(self.processes[role]) for role in ROLES[:3]]
        return (sum(after) - sum(before)) / IDLE_SECONDS


@contextmanager
def open_ways(*arguments: str) -> Iterator[Ways]:
    """A worker, its child with a thread for every core: how many there are is not to depend on the neighbours."""
    flags = ("--model", MODEL, "--no-prefix-caching", "--num-threads", str(len(os.sched_getaffinity(0))), *arguments)
    module = ("-m", "benchmarks.shortcut_worker")
    with (
        worker_process(*flags, module=module, has_pipes=True) as (url, worker),
        redis.Redis.from_url(url) as connection,
        Client(url) as client,
        closing(WholePath(url)) as path,
    ):
        (child,) = children(worker.pid)
        server = connection.info("server")
        processes = {"engine child": child, "parent": worker.pid, "Redis": int(server["process_id"])}
        processes["clients"] = os.getpid()
        yield Ways(
            {
                "engine alone": EngineAlone(worker),
                "whole path, read elsewhere": QueuedWay(
                    ReadElsewhere(client, int(server["tcp_port"])).run_jobs, processes
                ),
                "whole path": QueuedWay(path.run_jobs, processes),
            },
            processes,
        )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--slices", default=16, show_default=True)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--shorter", default=4, show_default=True, help="Prompts and outputs are so many times shorter.")
@click.argument("worker_arguments", nargs=-1, type=click.UNPROCESSED)
def main(slices: int, num_prompts: int, shorter: int, worker_arguments: Sequence[str]) -> None:
    prompt_range, output_range = ((low // shorter, high // shorter) for low, high in (PROMPT_RANGE, OUTPUT_RANGE))
    works = [uniform_workload(num_prompts, prompt_range, output_range, seed=seed) for seed in range(slices)]
    with open_ways(*worker_arguments) as ways:
        idle_cpu = ways.idle_cpu()
        warmup = uniform_workload(num_prompts, (8, 16), (4, 8), seed=slices)
        for _ in take_turns(list(ways.contenders.values()), [warmup]):
            pass
        taken: dict[str, list[Slice]] = {name: [] for name in ways.contenders}
        for number, group in enumerate(take_turns(list(ways.contenders.values()), works)):
            check(group, works[number])
            for own, slice_ in zip(taken.values(), group, strict=True):
                own.append(slice_)
            print(*(f"{slice_.seconds:.2f} s" for slice_ in group), sep=", ", file=sys.stderr, flush=True)
    notes = [
        f"SmolLM2-135M-Instruct, {' '.join(worker_arguments) or 'float32'}, {num_prompts} prompts "
        f"U{prompt_range} → U{output_range} tokens at once in a slice, greedy, {slices} slices.",
        f"Beside the engine alone, too, the idle worker and its Redis took {100 * idle_cpu:.2f}% of a core.",
    ]
    report(taken, works, notes)


def check(group: Sequence[Slice], work: Workload) -> None:
    if any(slice_.token_ids != group[0].token_ids for slice_ in group):
        raise SystemExit("the queue changed an output")
    if list(map(len, group[0].token_ids)) != work.max_tokens:
        raise SystemExit("an output ended early")


def report(taken: dict[str, list[Slice]], works: Sequence[Workload], notes: list[str]) -> None:
    alone = taken["engine alone"]
    counts = [work.num_output_tokens for work in works]
    rows = []
    for name, own in taken.items():
        pairs = list(zip(alone, own, strict=True))
        speed = statistics.median(count / slice_.seconds for count, slice_ in zip(counts, own, strict=True))
        ratios = [
            [other.seconds / slice_.seconds for other, slice_ in pairs],
            [other.cpu_seconds("engine child") / slice_.cpu_seconds("engine child") for other, slice_ in pairs],
            [other.cpu_seconds(*ROLES[:3]) / slice_.cpu_seconds(*ROLES[:3]) for other, slice_ in pairs],
            [other.cpu_seconds(*ROLES) / slice_.cpu_seconds(*ROLES) for other, slice_ in pairs],
        ]
        cpu = [
            1000 * statistics.median(slice_.cpu[role] / n for n, slice_ in zip(counts, own, strict=True))
            for role in ROLES
        ]
        rows.append([name, f"{speed:.0f}", *map(describe, ratios), *(f"{seconds:.3f}" for seconds in cpu)])
    columns = ["way", "tok/s", "speed", "CPU of the child", "CPU of child, parent, Redis", "CPU of all", *ROLES]
    print_and_keep("queue_cost", columns, rows, notes)


if __name__ == "__main__":
    main()
