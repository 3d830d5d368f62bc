"""What jobs take in Redis: bytes of a queued, a running and a finished job, and CPU time of Redis and of a worker.

The engine is a fake that costs next to nothing, so that what is measured is the queue's side of a job.

    python -m benchmarks.redis_memory [--num-queued 100000] [--num-running 1000]
"""

import json
import time
from typing import Any

import click
import redis

from benchmarks.process_figures import cpu_seconds
from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import worker_process
from producer import Client
from producer.contract import keys
from worker.embedded_redis import EmbeddedRedis

PROMPT_CHARS = 2000
NUM_TOKENS = 256
CPU_JOBS = 2000
FAKE_WORKER = ("-m", "tests.fakes.worker_runs")


@click.command()
@click.option("--num-queued", default=100_000, show_default=True)
@click.option("--num-running", default=1_000, show_default=True)
def main(num_queued: int, num_running: int) -> None:
    rows = [
        *measure_running(num_running),
        *measure_cpu(),
        *measure_queued(num_queued),
    ]
    notes = [
        f"Prompts of {PROMPT_CHARS} characters of English-like text; every job asks for {NUM_TOKENS} tokens.",
        "Running: every token stored in the stream, nothing committed yet. Bytes are `used_memory` before and after, "
        "per job. CPU: from the first submit to the last commit, divided by the jobs; the worker's without a model.",
    ]
    print_and_keep("redis_memory", ["what", "in all", "a job"], rows, notes)


def requests(number: int, *, max_tokens: int) -> list[dict[str, Any]]:
    """Prompts that differ, so that they compress no better than text does."""
    words = [f"word{(7919 * at) % 9973}" for at in range(400)]
    return [
        {
            "prompt": f"{at} " + " ".join(words[(31 * at + i) % 400] for i in range(300))[:PROMPT_CHARS],
            "max_tokens": max_tokens,
        }
        for at in range(number)
    ]


def used_memory(connection: redis.Redis) -> int:
    return int(connection.info("memory")["used_memory"])


def row(what: str, num_bytes: int, number: int) -> list[str]:
    return [what, f"{num_bytes / 2**20:.1f} MiB", f"{num_bytes / number:.0f} bytes"]


def measure_queued(number: int) -> list[list[str]]:
    with EmbeddedRedis() as server, Client(server.url) as client, redis.Redis.from_url(server.url) as connection:
        client.submit("first", max_tokens=1)
        before = used_memory(connection)
        for start in range(0, number, 10_000):
            client.submit_many(requests(min(10_000, number - start), max_tokens=NUM_TOKENS))
        return [row(f"{number:,} queued jobs", used_memory(connection) - before, number)]


def measure_running(number: int) -> list[list[str]]:
    """All of them at once in one worker, in the middle of their output."""
    settings: dict[str, Any] = {"PROMPTMILL_MAX_NUM_SEQS": str(number), "FAKE_STEP_SECONDS": "0.05"}
    with (
        worker_process(module=FAKE_WORKER, **settings) as (url, _),
        Client(url) as client,
        redis.Redis.from_url(url) as connection,
    ):
        before = used_memory(connection)
        jobs = client.submit_many(requests(number, max_tokens=3000))
        streams = [keys.stream_key(job.id) for job in jobs]
        while (num_tokens := count_tokens(connection, streams)) < NUM_TOKENS * number:
            time.sleep(0.2)
        grown = used_memory(connection) - before
    return [row(f"{number:,} running jobs, {num_tokens / number:.0f} tokens each", grown, number)]


def count_tokens(connection: redis.Redis, streams: list[str]) -> int:
    """From the last entry of each stream: one choice, so its offset counts all."""
    with connection.pipeline(transaction=False) as pipe:
        for stream in streams:
            pipe.xrevrange(stream, count=1)
        replies = pipe.execute()
    entries = [json.loads(reply[0][1][b"d"]) for reply in replies if reply and b"d" in reply[0][1]]
    return sum(entry.get("token_offset", 0) + len(entry.get("token_ids", [])) for entry in entries)


def measure_cpu() -> list[list[str]]:
    with (
        worker_process(module=FAKE_WORKER, FAKE_STEP_SECONDS="0.01") as (url, worker),
        Client(url) as client,
        redis.Redis.from_url(url) as connection,
    ):
        before = used_memory(connection)
        redis_pid = int(connection.info("server")["process_id"])
        start = cpu_seconds(redis_pid), cpu_seconds(worker.pid)
        jobs = client.submit_many(requests(CPU_JOBS, max_tokens=NUM_TOKENS))
        assert all(result.status == "finished" for result in client.as_completed(jobs, timeout=600))
        spent = cpu_seconds(redis_pid) - start[0], cpu_seconds(worker.pid) - start[1]
        grown = used_memory(connection) - before
    names = "Redis", "the worker, without a model"
    return [
        row(f"{CPU_JOBS:,} finished jobs, stream and result still there", grown, CPU_JOBS),
        *(
            [f"CPU of {name}", f"{seconds:.1f} s", f"{1000 * seconds / CPU_JOBS:.2f} ms"]
            for name, seconds in zip(names, spent, strict=True)
        ),
    ]


if __name__ == "__main__":
    main()
