"""How soon a job goes on after its worker was killed: from kill -9 to the job's next token from another worker.

Two workers with the default lease; all jobs run on the first when it is killed. The next worker prefills the
prompts and the tokens stored by then; tokens that were computed and not stored yet (30 ms of them) are generated again
and cannot be counted here.

    python -m benchmarks.recovery [--rounds 3] [--jobs 16] [--lease-seconds 15]
"""

import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import click
import redis

from benchmarks.report import print_and_keep
from producer import Client
from producer.contract import Chunk, keys, parse_entry
from worker.embedded_redis import EmbeddedRedis

MODEL = "smollm2-135m"
WAIT_SECONDS = 120.0


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--jobs", "num_jobs", default=16, show_default=True)
@click.option("--lease-seconds", default=15.0, show_default=True)
def main(rounds: int, num_jobs: int, lease_seconds: float) -> None:
    seconds: list[float] = []
    recomputed: list[int] = []
    for _ in range(rounds):
        with EmbeddedRedis() as server, Client(server.url) as client:
            found, num_tokens = measure(server.url, client, num_jobs, lease_seconds)
            seconds += found
            recomputed.append(num_tokens)
    rows = [
        ["seconds from kill to next token", f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"],
        ["stored output tokens prefilled again, a job", f"{statistics.median(recomputed) / num_jobs:.0f}", ""],
    ]
    notes = [f"SmolLM2-135M-Instruct, {num_jobs} jobs, a lease of {lease_seconds:g} s, {rounds} rounds."]
    print_and_keep("recovery", ["what", "median", "max"], rows, notes)


def measure(url: str, client: Client, num_jobs: int, lease_seconds: float) -> tuple[list[float], int]:
    """For each job the seconds to its next token; and how many tokens were stored at the kill."""
    first, second = [start_worker(url, client, lease_seconds) for _ in range(2)]
    second.send_signal(signal.SIGSTOP)  # until the first one has all the jobs
    with redis.Redis.from_url(url) as connection, connection.pubsub(ignore_subscribe_messages=True) as streams:
        streams.psubscribe("promptmill:stream:*")
        jobs = client.submit_many(
            [{"prompt": f"Tell a story about {n}.", "max_tokens": 1000, "ignore_eos": True} for n in range(num_jobs)]
        )
        wait_for_entries(streams, [job.id for job in jobs], attempt=1)
        second.send_signal(signal.SIGCONT)
        try:
            first.kill()
            killed_at = time.monotonic()
            first.wait()
            num_stored = sum(len(chunk.token_ids) for job in jobs for chunk in stored_chunks(connection, job.id))
            arrivals = wait_for_entries(streams, [job.id for job in jobs], attempt=2)
            return [at - killed_at for at in arrivals.values()], num_stored
        finally:
            second.kill()
            second.wait()


def start_worker(url: str, client: Client, lease_seconds: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "producer", "worker", "--redis-url", url, "--model", MODEL]
    worker = subprocess.Popen([*command, "--lease-seconds", str(lease_seconds)], stderr=subprocess.DEVNULL)
    while not any(info.pid == worker.pid for info in client.workers()):
        if worker.poll() is not None:
            raise SystemExit("the worker did not start")
        time.sleep(0.02)
    return worker


def stored_chunks(connection: redis.Redis, job_id: str) -> list[Chunk]:
    rows: Any = connection.xrange(keys.stream_key(job_id))
    entries = [parse_entry(fields[b"d"]) for _, fields in rows if b"d" in fields]
    return [entry for entry in entries if isinstance(entry, Chunk)]


def wait_for_entries(streams: "redis.client.PubSub", job_ids: list[str], *, attempt: int) -> dict[bytes, float]:
    """When the first token of that attempt was published, by stream (monotonic seconds)."""
    missing, found = {keys.stream_key(job_id).encode() for job_id in job_ids}, {}
    end = time.monotonic() + WAIT_SECONDS
    while missing:
        if time.monotonic() > end:
            raise SystemExit(f"{len(missing)} jobs put out nothing in attempt {attempt}")
        message = streams.get_message(timeout=1.0)
        if message is not None and message["data"].startswith(b"%d-" % attempt) and message["channel"] in missing:
            missing.discard(message["channel"])
            found[message["channel"]] = time.monotonic()
    return found


if __name__ == "__main__":
    main()
