"""Workers hear of jobs the moment they are enqueued, by whomever, and ask a Redis that tells them nothing."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.suspension import resume, suspend

from producer import Client
from producer.contract import keys
from producer.redis_connection import close
from tests.fakes.sentinel_trio import SentinelTrio
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, enqueue_many, rq_queue, wait_for_result
from worker import claim_pace, service
from worker.queue_watch import QueueWatch
from worker.redis_client import connect
from worker.scripts import Scripts

WAIT_SECONDS = 30.0
ACME = keys.tenant_queue(keys.DEFAULT_QUEUE, "acme")
NEVER = 1e6  # seconds


class Heard:
    """What a watch tells."""

    def __init__(self) -> None:
        self.arrival = threading.Event()
        self.num_notes = 0
        self.queues: list[str] = []
        self.watching: list[bool] = []

    def note(self, queues: list[str]) -> None:
        self.num_notes += 1
        self.queues += queues
        self.arrival.set()

    def wait(self) -> None:
        assert self.arrival.wait(WAIT_SECONDS)
        self.arrival.clear()


@contextmanager
def watch(redis_url: str, *, has_limits: bool = False) -> Iterator[Heard]:
    heard, client = Heard(), connect(redis_url)
    watch = QueueWatch(
        client,
        queues=keys.class_queues(keys.DEFAULT_QUEUE),
        has_limits=has_limits,
        on_arrival=heard.note,
        on_watching=heard.watching.append,
    )
    watch.start()
    heard.wait()  # what came before it
    yield heard
    watch.stop()
    close(client)


@pytest.fixture
def only_the_watch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that hears of nothing looks at nothing, once it is watching."""
    monkeypatch.setattr(claim_pace, "WATCHED_SECONDS", NEVER)


@pytest.mark.parametrize("name", [keys.DEFAULT_QUEUE, f"{keys.DEFAULT_QUEUE}:high", ACME])
def test_a_job_of_plain_rq_is_heard_of(redis_url: str, redis_client: redis.Redis, name: str) -> None:
    with watch(redis_url) as heard:
        enqueue_many(rq_queue(redis_client, name), 1)
        heard.wait()
        assert heard.queues == [name] * (name == ACME)


def test_other_keys_are_not_heard_of(redis_url: str, redis_client: redis.Redis) -> None:
    with watch(redis_url) as heard:
        enqueue_many(rq_queue(redis_client, f"{keys.DEFAULT_QUEUE}-other"), 1)
        redis_client.zadd(keys.leases_key(ACME), {"job": 1.0})
        assert not heard.arrival.is_set()
        enqueue_many(rq_queue(redis_client), 1)  # comes after those
        heard.wait()


def test_of_tenants_with_limits_leases_that_end_are_heard_of_and_renewals_are_not(
    redis_url: str, redis_client: redis.Redis
) -> None:
    sweep = {"queue": keys.DEFAULT_QUEUE, "lease_seconds": 1.0, "max_jobs": 9, "execution_id": "e"}
    with watch(redis_url, has_limits=True) as heard:
        for seconds in range(20):
            redis_client.zadd(keys.leases_key(ACME), {"job": time.time() + 1000 + seconds})
        enqueue_many(rq_queue(redis_client, ACME), 1)
        wait_until(lambda: heard.queues)  # what came before it was heard of by then
        assert heard.num_notes < 10
        heard.arrival.clear()
        redis_client.sadd(keys.leased_key(keys.DEFAULT_QUEUE), ACME)
        redis_client.zadd(keys.leases_key(ACME), {"job": 1.0})
        Scripts().sweep(redis_client, **sweep)  # type: ignore[arg-type]
        heard.wait()


def test_a_watch_that_is_cut_off_comes_back(redis_url: str, redis_client: redis.Redis) -> None:
    with watch(redis_url) as heard:
        redis_client.client_kill_filter(_type="pubsub")
        heard.wait()  # what came meanwhile
        assert heard.watching == [True, False, True]
        enqueue_many(rq_queue(redis_client), 1)
        heard.wait()


def test_behind_sentinels_the_master_of_the_moment_tells(tmp_path: Path) -> None:
    with SentinelTrio(tmp_path) as trio, watch(trio.url) as heard, Client(trio.url) as client:
        client.submit("Hi")
        heard.wait()
        trio.fail_over()
        wait_until(lambda: heard.watching[-2:] == [False, True])
        heard.wait()  # what came meanwhile
        client.submit("Hi")
        heard.wait()


@pytest.mark.usefixtures("only_the_watch_tells")
def test_jobs_run_at_once_whoever_enqueues_them(redis_url: str, redis_client: redis.Redis, client: Client) -> None:
    with WorkerThread(redis_url):
        for _ in range(5):
            assert client.submit("Hi", max_tokens=2).result(timeout=WAIT_SECONDS).status == "finished"
            (job_id,) = enqueue_many(rq_queue(redis_client, f"{keys.DEFAULT_QUEUE}:low"), 1, max_tokens=2)
            assert wait_for_result(redis_client, job_id).status == "finished"
            job = client.submit("Hi", max_tokens=2, tenant="acme")
            assert job.result(timeout=WAIT_SECONDS).status == "finished"


@pytest.mark.usefixtures("only_the_watch_tells")
def test_the_first_job_of_a_tenant_of_plain_rq_runs_at_once(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LOOK_SECONDS", NEVER)
    with WorkerThread(redis_url) as worker:
        wait_until(lambda: worker.service._tenants._listed_at and worker.service._loop.pace._is_watched)
        for tenant in ("acme", "bolt", "acme"):
            queue = keys.tenant_queue(keys.DEFAULT_QUEUE, tenant)
            (job_id,) = enqueue_many(rq_queue(redis_client, queue), 1, max_tokens=2)
            assert wait_for_result(redis_client, job_id).status == "finished"


@pytest.mark.usefixtures("only_the_watch_tells")
def test_jobs_that_wait_while_rq_is_suspended_run_when_it_is_resumed(
    redis_url: str, redis_client: redis.Redis, client: Client
) -> None:
    with WorkerThread(redis_url) as worker:
        suspend(redis_client)
        job = client.submit("Hi", max_tokens=2)
        wait_until(lambda: worker.service._intake.is_suspended)
        resume(redis_client)
        assert job.result(timeout=WAIT_SECONDS).status == "finished"


@pytest.mark.usefixtures("only_the_watch_tells")
@pytest.mark.parametrize(("drain", "num_taken"), [("hand-over", 2), ("finish", 1)])
def test_a_tenants_seat_that_comes_free_in_one_worker_is_taken_by_another(
    drain: str, num_taken: int, redis_url: str, client: Client
) -> None:
    with WorkerThread(redis_url, max_running_per_tenant=1, drain=drain) as one:
        one.engine.pause()
        first = client.submit("Hi", max_tokens=2, tenant="acme")
        wait_until(lambda: one.engine.running)
        with WorkerThread(redis_url, max_running_per_tenant=1) as two:
            second = client.submit("Hi", max_tokens=2, tenant="acme")
            pace = two.service._loop.pace
            wait_until(lambda: pace.seconds_until_due(time.monotonic()) > WAIT_SECONDS)  # it has found no seat
            one.service.request_stop()  # it hands its job over, to the front; or ends it, and claims no other
            if drain == "finish":
                one.engine.go_on()
            assert first.result(timeout=WAIT_SECONDS).status == "finished"
            assert second.result(timeout=WAIT_SECONDS).status == "finished"
            assert len(two.engine.submitted) == num_taken


def test_a_worker_that_is_full_does_not_look_for_jobs(
    redis_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerThread(redis_url, max_num_jobs=3) as worker:
        worker.engine.pause()
        client.submit_many([{"prompt": f"Job {number}", "max_tokens": 2} for number in range(6)])
        wait_until(lambda: len(worker.engine.running) == 3)
        num_claims = count_claims(worker, monkeypatch)
        job = client.submit("One more", max_tokens=2)
        worker.service._loop.request_job_stop(worker.engine.running[0].split(":")[0], "cancelled")
        wait_until(lambda: num_claims)  # its seat is taken
        assert len(num_claims) == 1
        worker.engine.go_on()
        assert job.result(timeout=WAIT_SECONDS).status == "finished"


def count_claims(worker: WorkerThread, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every look for jobs."""
    asked: list[int] = []
    claim = worker.service._intake.claim

    def counted(max_jobs: int, **more: Any) -> object:
        asked.append(max_jobs)
        return claim(max_jobs, **more)

    monkeypatch.setattr(worker.service._intake, "claim", counted)
    return asked


def test_a_redis_that_tells_nothing_is_asked(redis_url: str, redis_client: redis.Redis, client: Client) -> None:
    redis_client.acl_setuser("quiet", enabled=True, passwords=["+pw"], categories=["+@all"], keys=["*"], channels=["*"])
    redis_client.execute_command("ACL", "SETUSER", "quiet", "-client|tracking")
    try:
        with WorkerThread(redis_url.replace("redis://", "redis://quiet:pw@")):
            assert client.submit("Hi", max_tokens=2).result(timeout=WAIT_SECONDS).status == "finished"
    finally:
        redis_client.acl_deluser("quiet")
