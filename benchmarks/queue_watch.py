"""What it costs one Redis that many idle workers hear of jobs, beside workers that ask for them every 20 ms.

The workers are threads of one process, each with the watch, the pace and the claims of a real one and connections of
its own; what they claim they drop. So what is measured is Redis: CPU time, replies sent, claims, and how long a job
lies on its queue. With every job all workers hear of two changes, of its arrival and of the claim.

    python -m benchmarks.queue_watch [--workers 50] [--seconds 5]
"""

import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import click
import redis

from benchmarks.process_figures import cpu_seconds
from benchmarks.report import print_and_keep
from producer import Client
from producer.contract import keys
from worker.claim_pace import ClaimPace
from worker.embedded_redis import EmbeddedRedis
from worker.queue_watch import QueueWatch
from worker.redis_client import connect
from worker.scripts import Scripts

RATES = (0, 10, 100)  # jobs a second
MAX_CLAIM = 64
LEASE_SECONDS = 3600.0
CLOSE_SECONDS = 5.0


class IdleWorker:
    """It claims whatever it can, on a thread of its own."""

    def __init__(self, redis_url: str, *, is_watching: bool) -> None:
        self.claimed_at: dict[str, float] = {}  # monotonic seconds by job
        self.num_claims = 0
        self.has_begun = threading.Event()
        self._is_stopping = False
        self._wake = threading.Event()
        self._client = connect(redis_url)
        self._pace = ClaimPace(self._wake.set)
        self._queues = keys.class_queues(keys.DEFAULT_QUEUE)
        self._watch: QueueWatch | None = None
        if is_watching:
            self._watch = QueueWatch(
                self._client,
                queues=self._queues,
                has_limits=False,
                on_arrival=self._pace.note_arrival,
                on_watching=self._pace.set_watched,
            )
            self._watch.start()
        self._scripts = Scripts()
        self._name = uuid.uuid4().hex
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_stopping = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._watch is not None:
            self._watch.stop()
        self._client.close()

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.wait(self._pace.seconds_until_due(time.monotonic()))
            self._wake.clear()
            now = time.monotonic()
            if self._pace.seconds_until_due(now) > 0:
                continue
            claims = self._claim(self._pace.begin())
            self._pace.end(now, may_have_more=len(claims) == MAX_CLAIM, is_busy=False)
            self.claimed_at |= dict.fromkeys(claims, time.monotonic())
            self.num_claims += 1
            self.has_begun.set()

    def _claim(self, tenant_queues: list[str]) -> list[str]:
        reply = self._scripts.claim(
            self._client,
            request_id=uuid.uuid4().hex,
            worker=self._name,
            queues=self._queues,
            tenant_queues=tenant_queues,
            max_jobs=MAX_CLAIM,
            lease_seconds=LEASE_SECONDS,
        )
        assert reply is not None
        return [claim[0].decode() for claim in reply[0]]


@contextmanager
def idle_workers(redis_url: str, number: int, *, is_watching: bool) -> Iterator[list[IdleWorker]]:
    workers = [IdleWorker(redis_url, is_watching=is_watching) for _ in range(number)]
    try:
        for worker in workers:
            worker.has_begun.wait()
        yield workers
    finally:
        for worker in workers:
            worker.close()


def measure(server: EmbeddedRedis, workers: list[IdleWorker], rate: int, seconds: float) -> list[str]:
    """A row's cells from `Redis, % of a core` on."""
    with redis.Redis.from_url(server.url) as connection, Client(server.url) as client:
        time.sleep(1.0)  # what came before is over
        sent = connection.info("stats")["total_net_output_bytes"]
        cpu, num_claims, start = cpu_seconds(server.pid), _num_claims(workers), time.monotonic()
        submitted_at: dict[str, float] = {}
        for number in range(round(rate * seconds)):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            at = time.monotonic()
            submitted_at[client.submit("Hi", max_tokens=1).id] = at
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        elapsed = time.monotonic() - start
        cpu, num_claims = cpu_seconds(server.pid) - cpu, _num_claims(workers) - num_claims
        sent = connection.info("stats")["total_net_output_bytes"] - sent
    claimed_at = {job_id: at for worker in workers for job_id, at in list(worker.claimed_at.items())}
    waits = [claimed_at[job_id] - at for job_id, at in submitted_at.items() if job_id in claimed_at]
    if len(waits) < 0.99 * len(submitted_at):
        raise SystemExit(f"{len(submitted_at) - len(waits)} jobs of {len(submitted_at)} were not claimed")
    wait = f"{1000 * statistics.median(waits):.1f}" if waits else ""
    return [f"{100 * cpu / elapsed:.1f}", f"{num_claims / elapsed:.0f}", f"{sent / elapsed / 1000:.0f}", wait]


def _num_claims(workers: list[IdleWorker]) -> int:
    return sum(worker.num_claims for worker in workers)


@click.command()
@click.option("--workers", "num_workers", default=50, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
def main(num_workers: int, seconds: float) -> None:
    rows = []
    for name, is_watching in (("hear of jobs", True), ("ask every 20 ms", False)):
        with (
            EmbeddedRedis() as server,
            idle_workers(server.url, num_workers, is_watching=is_watching) as workers,
        ):
            for rate in RATES:
                rows.append([name, str(rate), *measure(server, workers, rate, seconds)])
                print(" | ".join(rows[-1]), flush=True)
    columns = ["workers that", "jobs/s", "Redis, % of a core", "claims/s", "kB/s sent", "median wait, ms"]
    notes = [
        f"{num_workers} idle workers on one Redis, {seconds:g} s a row, jobs submitted one at a time.",
        "The wait is from the call of `submit` to the claim's reply; all workers share one process.",
    ]
    print_and_keep("queue_watch", columns, rows, notes)


if __name__ == "__main__":
    main()
