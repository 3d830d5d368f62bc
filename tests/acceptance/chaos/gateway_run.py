"""Chaos for gateways: batches with their files, and streams that are read on at any replica, while gateways and their
carriers die or stand still, connections are cut, Redis and the store go away; or while Redis loses what it was told.

python -m tests.acceptance.chaos.gateway_run --seed 7 --runs 20
"""

import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import click
import httpx2 as httpx
import redis

from tests.acceptance.chaos.asking import Asking
from tests.acceptance.chaos.batch_owner import Owner, Plan
from tests.acceptance.chaos.batch_verdict import BatchVerdict
from tests.acceptance.chaos.full_redis import fill
from tests.acceptance.chaos.gateway_fleet import NUM_GATEWAYS, GatewayFleet
from tests.acceptance.chaos.gateway_loss_scene import GatewayLossScene
from tests.acceptance.chaos.mixture_run import MixtureReport
from tests.acceptance.chaos.mixture_verdict import end_times
from tests.acceptance.chaos.rollback_scene import RollbackScene
from tests.acceptance.chaos.run import wait_for
from tests.acceptance.chaos.sentinel_scene import SentinelScene
from tests.acceptance.chaos.stream_reader import StreamReader
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.file_stores import BucketOfFiles, FolderOfFiles, PlaceOfFiles
from tests.fakes.flaky_s3 import FlakyS3
from tests.fakes.ports import free_port
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.worker_runs import WorkerThread
from worker.embedded_redis import EmbeddedRedis
from worker.redis_client import connect

NUM_STREAMS = 12
JOB_LEASE_SECONDS = 2.0
MAX_IN_FLIGHT = 20
BEGIN_SECONDS = 60.0
END_SECONDS = 120.0  # a carrier that died several times is started again after half a minute
MAX_MODEL_LEN = 1_000_000  # a prompt of a megabyte is not refused for its size
PAUSE_SECONDS = 0.1
S3_SHARE = 0.7


class GatewayScene:
    keeps_all = True

    def __init__(self, stack: ExitStack, folder: Path, seed: int) -> None:
        self._rng = rng = random.Random(f"gateways of {seed}")
        self.server = stack.enter_context(EmbeddedRedis(data_dir=folder / "redis", port=free_port(), fsync="always"))
        self.url = self.server.url
        anywhere, self._loss = rng.random() < 0.5, rng.choice((0.0, 0.0, 0.01, 0.03))
        self._proxies = [
            stack.enter_context(CuttingProxy(self.server.port, seed=rng.randrange(1000), anywhere=anywhere))
            for _ in range(NUM_GATEWAYS + 1)
        ]
        self._store = stack.enter_context(FlakyS3(seed=seed)) if rng.random() < S3_SHARE else None
        self.place: PlaceOfFiles = FolderOfFiles(folder / "files")
        options = ["--files", str(folder / "files"), "--batch-max-in-flight", str(MAX_IN_FLIGHT)]
        if self._store is not None:
            self.place = BucketOfFiles(self._store.endpoint, f"files-{seed}")
            options[1] = f"s3://results/files-{seed}"
            options += ["--s3-endpoint-url", self._store.endpoint]
        engine = FakeEngine(step_seconds=rng.choice((0.005, 0.02, 0.05)), max_model_len=MAX_MODEL_LEN)
        stack.enter_context(
            WorkerThread(self._proxies[-1].url, engine, lease_seconds=JOB_LEASE_SECONDS, max_num_seqs=8)
        )
        self.gateways = stack.enter_context(GatewayFleet([proxy.url for proxy in self._proxies[:-1]], options, folder))

    def begin(self) -> None:
        """From now on replies are lost, and the store fails."""
        for proxy in self._proxies:
            proxy.probability = self._loss
        if self._store is not None:
            self._store.probability = self._rng.choice((0.0, 0.1, 0.3))
            self._store.proxy.probability = self._rng.choice((0.0, 0.02))

    def hurt(self) -> str | None:
        """One fault, or none; what it was."""
        rng, chance = self._rng, self._rng.random()
        if chance < 0.08:
            return self.gateways.hurt(rng)
        if chance < 0.11:
            rng.choice(self._proxies).cut_all()
            return "cut"
        if chance < 0.125:
            seconds = rng.choice((0.0, 0.5, 3.0))
            self.server.kill()
            time.sleep(seconds)
            self.server.start()
            return f"Redis away for {seconds} s"
        if chance < 0.135:
            return fill(self.server.url, rng)
        if chance < 0.16 and self._store is not None:
            is_down, hangs = rng.choice(((False, False), (True, False), (False, True)))
            self._store.is_down = is_down
            (self._store.go_on.clear if hangs else self._store.go_on.set)()
            return "S3 refuses" if is_down else "S3 hangs" if hangs else "S3 is back"
        return None

    def heal(self) -> None:
        if self._store is not None:
            self._store.heal()
        for proxy in self._proxies:
            proxy.probability = 0.0
        self.gateways.heal()


AnyScene = GatewayScene | GatewayLossScene


def make_scene(kind: str, stack: ExitStack, folder: Path, seed: int) -> AnyScene:
    if kind == "plain":
        return GatewayScene(stack, folder, seed)
    return GatewayLossScene(stack, folder, seed, SentinelScene if kind == "sentinel" else RollbackScene)


def run_gateways(
    seed: int, *, num_batches: int, fault_seconds: float, folder: Path, kind: str = "plain"
) -> MixtureReport:
    report, rng, is_over = MixtureReport(), random.Random(f"clients of {seed}"), threading.Event()
    with ExitStack() as stack:
        scene = make_scene(kind, stack, folder, seed)
        connection = stack.enter_context(connect(scene.url))
        urls = [slot.url for slot in scene.gateways.slots]
        plans = [Plan.make(f"batch{at}", rng, may_be_large=scene.keeps_all) for at in range(num_batches)]
        owners = [_make_owner(plan, rng, urls, is_over, connection) for plan in plans]
        readers = [reader for at in range(NUM_STREAMS) for reader in _make_readers(f"stream{at}", rng, urls, is_over)]
        clients: list[Asking] = [*owners, *readers]
        for client in clients:
            client.keeps_all = scene.keeps_all
        stack.callback(is_over.set)
        threads = _hurt_while_they_ask(scene, clients, rng, fault_seconds, report)
        scene.heal()
        healed_at = time.monotonic()
        for thread in threads:
            thread.join(max(0.0, healed_at + END_SECONDS - time.monotonic()))
        api = stack.enter_context(httpx.Client(base_url=urls[0], timeout=60))
        verdict = BatchVerdict(api, connection, {owner.name: owner for owner in owners}, keeps_all=scene.keeps_all)
        # The end that a reader was told may be lost with the files that Redis came back from: the job runs once more.
        read = {reader.job_id for reader in readers if reader.job_id is not None}
        wait_for(lambda: verdict.have_ended() and read <= end_times(connection).keys(), END_SECONDS)
        report.num_jobs = sum(len(owner.plan.lines) for owner in owners) + NUM_STREAMS
        report.seconds = time.monotonic() - healed_at
        is_over.set()
        runs = Counter({job_id: len(times) for job_id, times in end_times(connection).items()})
        wrong = {reader.name for reader in readers if runs[reader.job_id or ""] != 1}
        report.problems += [f"{client.name}: {problem}" for client in clients for problem in client.problems]
        report.problems += [f"{name}: its job did not end once" for name in wrong]
        report.problems += verdict.find_problems(scene.place, runs)
        report.events.append(f"{sum(owner.num_uploads for owner in owners)} uploads of {num_batches} files")
        report.events.append(f"{sum(reader.num_visits for reader in readers)} visits of {len(readers)} readers")
    return report


def _make_owner(
    plan: Plan, rng: random.Random, urls: list[str], is_over: threading.Event, connection: redis.Redis
) -> Owner:
    return Owner(plan.name, urls, is_over, random.Random(rng.random()), plan=plan, connection=connection)


def _make_readers(name: str, rng: random.Random, urls: list[str], is_over: threading.Event) -> list[StreamReader]:
    """Several of one job."""
    body = {"model": "fake", "prompt": name, "seed": rng.randrange(900), "max_tokens": rng.randint(20, 300)}
    body |= {"n": rng.choice((1, 2)), "stream": True}
    return [
        StreamReader(f"{name} {at}", urls, is_over, random.Random(rng.random()), key=name, body=body)
        for at in range(rng.randint(1, 4))
    ]


def _hurt_while_they_ask(
    scene: AnyScene, clients: list[Asking], rng: random.Random, seconds: float, report: MixtureReport
) -> list[threading.Thread]:
    """The clients begin one after the other, those of one key together; all before the first fault, where what they ask
    for might be lost with it."""
    waiting = sorted(clients, key=lambda client: client.name, reverse=True)
    threads: list[threading.Thread] = []
    if not scene.keeps_all:
        threads = [_start(client) for client in waiting]
        waiting = []
        assert wait_for(lambda: all(client.has_begun or client.problems for client in clients), BEGIN_SECONDS)
    scene.begin()
    start = time.monotonic()
    while time.monotonic() - start < seconds or waiting:
        if waiting and rng.random() < 0.3:
            first = waiting.pop()
            begun = [first]
            while waiting and waiting[-1].name.split()[0] == first.name.split()[0]:
                begun.append(waiting.pop())
            threads += [_start(client) for client in begun]
        if event := scene.hurt():
            report.events.append(event)
        scene.gateways.look_after()
        time.sleep(PAUSE_SECONDS)
    return threads


def _start(client: Asking) -> threading.Thread:
    thread = threading.Thread(target=client.run, name=client.name, daemon=True)
    thread.start()
    return thread


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the first run; the others follow.")
@click.option("--runs", "num_runs", default=10, show_default=True)
@click.option("--batches", "num_batches", default=8, show_default=True)
@click.option("--fault-seconds", default=15.0, show_default=True)
@click.option("--sentinel", "kind", flag_value="sentinel", help="Fail-overs instead of all but what gateways suffer.")
@click.option("--rollback", "kind", flag_value="rollback", help="A Redis that comes back from older files, likewise.")
@click.option("--logs", type=click.Path(file_okay=False), help="Where a failing run's logs are kept.")
def main(seed: int, num_runs: int, num_batches: int, fault_seconds: float, kind: str | None, logs: str | None) -> None:
    """Run after run; one that fails is named by its seed, with what went wrong."""
    logging.basicConfig(filename=f"{logs}/workers.log" if logs else "/dev/null", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the processes started are ended too
    num_failed = 0
    for number in range(seed, seed + num_runs):
        with tempfile.TemporaryDirectory(prefix="promptmill-gateways-") as name:
            folder = Path(name)
            report = run_gateways(
                number, num_batches=num_batches, fault_seconds=fault_seconds, folder=folder, kind=kind or "plain"
            )
            if report.problems and logs is not None:
                for path in folder.glob("*.log"):
                    (Path(logs) / f"{number}-{path.name}").write_bytes(path.read_bytes())
        num_failed += bool(report.problems)
        print(f"seed {number}: {'FAILED' if report.problems else 'passed'}, {report}", flush=True)
    sys.exit(bool(num_failed))


if __name__ == "__main__":
    main()
