"""The ways that `queue_cost` compares: work to one worker's engine past the queue, and by way of Redis.

Each takes the same workload and gives what it took. Knows nothing of turns or tables.
"""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import redis

from benchmarks.process_figures import busy_seconds, children, cpu_seconds
from benchmarks.worker_fixture import worker_process
from benchmarks.workload import Workload
from producer import AsyncClient, AsyncJob, Client
from producer.contract import Result, keys

CHILD = "engine child"
ROLES = (CHILD, "parent", "Redis", "clients")


@dataclass(frozen=True, slots=True)
class Slice:
    """What one way took for some work."""

    seconds: float
    cpu: dict[str, float]  # seconds by role
    token_ids: list[list[int]]
    others: float = 0.0  # cores that other processes took meanwhile

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu.values())

    @property
    def cpu_beside_child(self) -> float:
        return self.cpu_seconds - self.cpu[CHILD]


class Way(Protocol):
    def measure(self, work: Workload) -> Slice: ...


class EngineAlone:
    def __init__(self, worker: "subprocess.Popen[bytes]") -> None:
        self._worker = worker

    def measure(self, work: Workload) -> Slice:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        request = {"prompts": work.prompts, "max_tokens": work.max_tokens}
        self._worker.stdin.write(json.dumps(request).encode() + b"\n")
        self._worker.stdin.flush()
        reply = json.loads(self._worker.stdout.readline())
        cpu = {CHILD: reply["child"], "parent": reply["parent"], "Redis": 0.0, "clients": 0.0}
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

    def run_jobs(self, workload: Workload) -> tuple[float, list[Result]]:
        return self._runner.run(self._submit_and_watch(requests_of(workload)))

    async def _submit_and_watch(self, requests: list[dict[str, Any]]) -> tuple[float, list[Result]]:
        start = time.perf_counter()
        jobs = await self._client.submit_many(requests)
        watched = await asyncio.gather(*map(watch, jobs))
        seconds = time.perf_counter() - start
        if any(token_ids != result.choices[0].token_ids for token_ids, result in watched):
            raise SystemExit("the streams and the results differ")
        return seconds, [result for _, result in watched]


async def watch(job: AsyncJob) -> tuple[list[int], Result]:
    """What was streamed, and then the result."""
    token_ids = [token_id async for chunk in job.stream() for token_id in chunk.token_ids]
    return token_ids, await job.result(timeout=60)


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
class Watched:
    """A way, and an eye on what else the machine does."""

    way: Way
    processes: dict[str, int]

    def measure(self, work: Workload) -> Slice:
        elsewhere, start = self._elsewhere_seconds(), time.perf_counter()
        slice_ = self.way.measure(work)
        elsewhere = self._elsewhere_seconds() - elsewhere
        return replace(slice_, others=elsewhere / (time.perf_counter() - start))

    def _elsewhere_seconds(self) -> float:
        return busy_seconds() - sum(map(cpu_seconds, self.processes.values()))


@dataclass(frozen=True, slots=True)
class Ways:
    """All of them, on one worker."""

    contenders: dict[str, Way]
    processes: dict[str, int]

    def watched(self) -> list["Watched"]:
        return [Watched(way, self.processes) for way in self.contenders.values()]

    def idle_cpu(self, seconds: float) -> float:
        """Cores that the worker and its Redis take while there is nothing to do."""
        pids = [self.processes[role] for role in ROLES if role != "clients"]
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        return (sum(map(cpu_seconds, pids)) - before) / seconds


@contextmanager
def open_ways(model: str, *arguments: str) -> Iterator[Ways]:
    """A worker, its child with a thread for every core: how many there are is not to depend on the neighbours."""
    flags = ("--model", model, "--no-prefix-caching", "--num-threads", str(len(os.sched_getaffinity(0))), *arguments)
    module = ("-m", "benchmarks.shortcut_worker")
    with (
        worker_process(*flags, module=module, has_pipes=True) as (url, worker),
        redis.Redis.from_url(url) as connection,
        Client(url) as client,
        closing(WholePath(url)) as path,
    ):
        (child,) = children(worker.pid)
        server = connection.info("server")
        processes = {CHILD: child, "parent": worker.pid, "Redis": int(server["process_id"])}
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
