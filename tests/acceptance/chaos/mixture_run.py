"""Chaos without a model: a mixture of jobs, workers that are cut off and killed, replies lost, a Redis that restarts
or is full, a bucket for the results that fails as buckets do.

python -m tests.acceptance.chaos.mixture_run --seed 7 --runs 20
"""

import logging
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import redis

from producer import Client, RedisUnavailableError
from producer.contract import keys
from tests.acceptance.chaos.full_redis import fill
from tests.acceptance.chaos.mixture import Mixture
from tests.acceptance.chaos.mixture_verdict import end_times, find_problems, left_behind
from tests.acceptance.chaos.rollback_scene import RollbackScene
from tests.acceptance.chaos.run import wait_for
from tests.acceptance.chaos.scene_workers import start_worker
from tests.acceptance.chaos.sentinel_scene import SentinelScene
from tests.acceptance.chaos.verdict import history
from tests.acceptance.chaos.watchers import Watchers
from tests.acceptance.chaos.workload import ChaosJob
from tests.fakes.flaky_s3 import BUCKET, FlakyS3
from tests.fakes.ports import free_port
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.worker_runs import WorkerProcess
from worker.embedded_redis import EmbeddedRedis
from worker.redis_client import connect

LEASE_SECONDS = 2.0
NUM_WATCHED = 30
END_SECONDS = 45.0
MAX_SECONDS = 35.0  # from the end of the faults: what a killed scheduler had locked is anybody's after 20
PAUSE_SECONDS = 0.1
S3_SHARE = 0.4


@dataclass(slots=True)
class MixtureReport:
    problems: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    num_jobs: int = 0
    seconds: float = 0.0
    """From the end of the faults to the end of the last job."""
    histories: list[str] = field(default_factory=list)
    """Of the first jobs with problems."""

    def __str__(self) -> str:
        head = f"{self.num_jobs} jobs, the last {self.seconds:.1f} s after the faults; {', '.join(self.events)}"
        return "\n  ".join([head, *self.problems[:20], *self.histories])


class Scene:
    """A Redis, workers on threads, perhaps one in a process of its own, and what becomes of them."""

    keeps_all = True
    """Whether what Redis has acknowledged stays: else a cursor alone does not tell where its reader was."""

    def __init__(self, stack: ExitStack, folder: Path, rng: random.Random, seed: int) -> None:
        self._rng = rng
        self._folder = folder
        self.server = stack.enter_context(EmbeddedRedis(data_dir=folder / "redis", port=free_port(), fsync="always"))
        anywhere, num_threads = rng.random() < 0.5, rng.randint(1, 3)
        self.proxies = [
            stack.enter_context(CuttingProxy(self.server.port, seed=rng.randrange(1000), anywhere=anywhere))
            for _ in range(num_threads + 2)
        ]
        self.store: FlakyS3 | None = None
        self.settings: dict[str, Any] = {"lease_seconds": LEASE_SECONDS}
        self._rng_of_store = random.Random(f"store of {seed}")
        if self._rng_of_store.random() < S3_SHARE:
            self.store = stack.enter_context(FlakyS3(seed=seed))
            self.settings |= {"results": f"s3://{BUCKET}/mixture/{seed}", "s3_endpoint_url": self.store.endpoint}
        for proxy in self.proxies[:num_threads]:
            start_worker(stack, proxy.url, rng, (0.001, 0.005, 0.02), **self.settings)
        self.process: WorkerProcess | None = None
        if rng.random() < 0.5:
            self.start_process()
        stack.callback(self.end_process)
        loss = rng.choice((0.0, 0.005, 0.02) if anywhere else (0.0, 0.02, 0.1))
        for proxy in self.proxies:
            proxy.probability = loss
        if self.store is not None:
            self.store.probability = self._rng_of_store.choice((0.0, 0.1, 0.5))
            self.store.proxy.probability = self._rng_of_store.choice((0.0, 0.02, 0.1))

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def lossy_url(self) -> str:
        return self.proxies[-1].url

    def wait_until_stored(self) -> None:
        """What Redis has acknowledged it keeps."""

    def start_process(self) -> None:
        self.end_process()
        url = self.proxies[-2].url
        log = self._folder / f"worker-{time.monotonic_ns()}.log"
        self.process = WorkerProcess(url, step_seconds=0.01, **self.settings, max_num_seqs=8, log=log)

    def end_process(self) -> None:
        if self.process is not None:
            self.process.__exit__()

    def hurt(self) -> str | None:
        """One fault, or none; what it was."""
        if event := self._hurt_store():
            return event
        rng, chance = self._rng, self._rng.random()
        if chance < 0.1:
            rng.choice(self.proxies).cut_all()
            return "cut"
        if chance < 0.13:
            seconds = rng.uniform(0.1, 3.0)
            with rng.choice(self.proxies).partition():
                time.sleep(seconds)
            return f"cut off for {seconds:.1f} s"
        if chance < 0.16:
            seconds = rng.choice((0.0, 0.5, 3.0))
            self.server.kill()
            time.sleep(seconds)
            self.server.start()
            return f"Redis away for {seconds} s"
        if chance < 0.18:
            return fill(self.url, rng)
        return self._hurt_process(chance) if self.process is not None else None

    def _hurt_store(self) -> str | None:
        """It stays as it is until the next fault of its own."""
        if self.store is None or self._rng_of_store.random() >= 0.06:
            return None
        is_down, hangs = self._rng_of_store.choice(((False, False), (True, False), (False, True)))
        self.store.is_down = is_down
        (self.store.go_on.clear if hangs else self.store.go_on.set)()
        return "S3 refuses" if is_down else "S3 hangs" if hangs else "S3 is back"

    def _hurt_process(self, chance: float) -> str | None:
        assert self.process is not None
        if self.process.process.poll() is not None:  # it does not start where replies are lost
            self.start_process()
            return None
        for below, number in ((0.24, signal.SIGKILL), (0.28, signal.SIGSTOP), (0.34, signal.SIGCONT)):
            if chance < below:
                self.process.signal(number)
                return number.name
        return None

    def heal(self) -> None:
        if self.store is not None:
            self.store.heal()
        for proxy in self.proxies:
            proxy.probability = 0.0
        if self.process is not None:
            self.process.signal(signal.SIGCONT)
            if self.process.process.poll() is not None:
                self.start_process()


AnyScene = Scene | SentinelScene | RollbackScene


def make_scene(kind: str, stack: ExitStack, folder: Path, rng: random.Random, seed: int) -> AnyScene:
    if kind == "sentinel":
        return SentinelScene(stack, folder, rng)
    return RollbackScene(stack, folder, rng) if kind == "rollback" else Scene(stack, folder, rng, seed)


def run_mixture(seed: int, *, num_jobs: int, fault_seconds: float, folder: Path, kind: str = "plain") -> MixtureReport:
    rng, report = random.Random(seed), MixtureReport()
    with ExitStack() as stack:
        scene = make_scene(kind, stack, folder, rng, seed)
        connection = stack.enter_context(connect(scene.url))
        client = stack.enter_context(Client(scene.url))
        lossy = stack.enter_context(Client(scene.lossy_url))
        mixture = Mixture(connection, lossy, seed)
        mixture.enqueue_some(num_jobs)
        scene.wait_until_stored()
        watched = rng.sample(sorted(mixture.expected), min(NUM_WATCHED, len(mixture.expected)))
        jobs = [ChaosJob(job_id, None, None, {}) for job_id in watched]
        watchers = Watchers(scene.lossy_url, jobs, seed=seed, keep_cursors=scene.keeps_all)
        watchers.start()
        hurt_for(scene, fault_seconds, client, mixture, report)
        scene.heal()
        if not scene.keeps_all:  # a cancel that was lost, too: such a job may run for minutes
            for _, job_id in mixture.cancels:
                client.cancel(job_id)
        healed_at = time.monotonic()
        wait_for(lambda: have_ended(connection, mixture), END_SECONDS)
        report.num_jobs, report.seconds = len(mixture.expected), time.monotonic() - healed_at
        wait_for(lambda: not left_behind(connection), END_SECONDS)
        watchers.wait(END_SECONDS)
        report.problems = find_problems(connection, mixture, watchers.seen, scene.store, keeps_outcomes=scene.keeps_all)
        wrong = [job_id for job_id in mixture.expected if any(job_id in problem for problem in report.problems)]
        report.histories = [f"{mixture.kinds[job_id]}: {history(connection, job_id, {})}" for job_id in wrong[:3]]
        if report.seconds > MAX_SECONDS:
            report.problems.append(f"the last job took {report.seconds:.1f} s from the end of the faults")
    return report


def have_ended(connection: redis.Redis, mixture: Mixture) -> bool:
    """All of them, and those that RQ repeats for the last time."""
    if not all(connection.exists(keys.result_key(job_id)) for job_id in mixture.expected):
        return False
    ends = end_times(connection)
    return all(len(ends[job_id]) >= number for job_id, number in mixture.num_runs.items())


def hurt_for(scene: AnyScene, seconds: float, client: Client, mixture: Mixture, report: MixtureReport) -> None:
    """And carry the cancels out meanwhile."""
    start = time.monotonic()
    cancels = sorted(mixture.cancels)
    while cancels or time.monotonic() - start < seconds:
        while cancels and cancels[0][0] <= time.monotonic() - start:
            try:
                client.cancel(cancels[0][1])
                cancels.pop(0)
            except RedisUnavailableError:
                continue
        if time.monotonic() - start < seconds and (event := scene.hurt()):
            report.events.append(event)
        time.sleep(PAUSE_SECONDS)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the first run; the others follow.")
@click.option("--runs", "num_runs", default=10, show_default=True)
@click.option("--jobs", "num_jobs", default=40, show_default=True)
@click.option("--fault-seconds", default=5.0, show_default=True)
@click.option("--sentinel", "kind", flag_value="sentinel", help="Fail-overs instead of all that.")
@click.option("--rollback", "kind", flag_value="rollback", help="A Redis that comes back from older files instead.")
@click.option("--log", type=click.Path(dir_okay=False), default="/dev/null", help="What the workers on threads log.")
def main(seed: int, num_runs: int, num_jobs: int, fault_seconds: float, kind: str | None, log: str) -> None:
    """Run after run; one that fails is named by its seed, with what went wrong."""
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(threadName)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the processes started are ended too
    num_failed = 0
    for number in range(seed, seed + num_runs):
        with tempfile.TemporaryDirectory(prefix="promptmill-mixture-") as folder:
            report = run_mixture(
                number,
                num_jobs=num_jobs,
                fault_seconds=fault_seconds,
                folder=Path(folder),
                kind=kind or "plain",
            )
        num_failed += bool(report.problems)
        print(f"seed {number}: {'FAILED' if report.problems else 'passed'}, {report}", flush=True)
    sys.exit(bool(num_failed))


if __name__ == "__main__":
    main()
