"""What a worker does beside its jobs, RQ's scheduling and the sweep: replies are lost, others die, chores hang."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler

from producer import Client, JobStatus
from producer.contract import keys
from tests.fakes.flaky_redis import FlakyRedis
from tests.fakes.worker_runs import FUNCTION, SHORT_LEASE_SECONDS, WorkerThread, enqueue_many, wait_for_result
from worker.rq_bridge.scheduler import LOCK_SECONDS, TAKE_OVER_SECONDS, InlineScheduler
from worker.scripts import Scripts
from worker.tenant_queues import TenantQueues


@pytest.fixture
def flaky(redis_url: str) -> Iterator[FlakyRedis]:
    with FlakyRedis.from_url(redis_url) as flaky:
        yield flaky


def schedule_some(queue: Queue, number: int) -> list[str]:
    """They are due."""
    return [queue.enqueue_in(timedelta(seconds=-1), FUNCTION, prompt="Hello", max_tokens=2).id for _ in range(number)]


def test_a_lost_reply_costs_the_scheduler_one_turn(queue: Queue, flaky: FlakyRedis) -> None:
    ids = schedule_some(queue, 2)
    scheduler = InlineScheduler([queue.name], flaky)
    flaky.lost_replies = 1
    with pytest.raises(redis.ConnectionError):
        scheduler.turn(0.0, [queue.name])
    assert queue.get_job_ids() == []
    scheduler.turn(1.0, [queue.name])
    assert sorted(queue.get_job_ids()) == sorted(ids) and not queue.scheduled_job_registry.get_job_ids()


@pytest.mark.parametrize("is_read", [True, False], ids=["once the jobs are known", "once they are read"])
def test_a_job_that_is_cancelled_as_its_time_comes_stays_cancelled(
    queue: Queue, flaky: FlakyRedis, client: Client, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    first, second = schedule_some(queue, 2)
    owner, name = (Job, "fetch_many") if is_read else (ScheduledJobRegistry, "get_jobs_to_schedule")
    read = getattr(owner, name)

    def cancel_meanwhile(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, read)
        found = read(*args, **kwargs)
        assert client.cancel(first)
        return found

    monkeypatch.setattr(owner, name, cancel_meanwhile)
    scheduler = InlineScheduler([queue.name], flaky)
    for now in (0.0, 1.0):
        scheduler.turn(now, [queue.name])
    assert queue.get_job_ids() == [second] and client.status(first) is JobStatus.CANCELLED
    assert queue.scheduled_job_registry.get_job_ids() == []


def test_the_queues_of_a_dead_scheduler_are_taken_over(
    queue: Queue, flaky: FlakyRedis, redis_client: redis.Redis
) -> None:
    dead, heir = (InlineScheduler([queue.name], flaky) for _ in range(2))
    lock = RQScheduler.get_locking_key(queue.name)
    for now in (0.0, 1.0):  # as it takes the queue, and at every later turn
        dead.turn(now, [queue.name])
        assert 0 < redis_client.ttl(lock) <= LOCK_SECONDS
    heir.turn(0.0, [queue.name])
    assert heir.acquired_locks == set()
    redis_client.delete(lock)  # its time is up
    ids = schedule_some(queue, 1)
    heir.turn(TAKE_OVER_SECONDS, [queue.name])
    assert queue.get_job_ids() == ids
    dead.turn(TAKE_OVER_SECONDS + 1, [queue.name])  # woken
    assert dead.acquired_locks == set()


def test_a_turn_for_a_thousand_tenants_takes_a_few_round_trips(queue: Queue, flaky: FlakyRedis) -> None:
    tenants = [keys.tenant_queue(queue.name, f"tenant{number}") for number in range(1000)]
    scheduler = InlineScheduler([queue.name], flaky)
    scheduler.turn(0.0, [queue.name, *tenants])
    assert len(scheduler.acquired_locks) == 1001
    ids, num_before = schedule_some(queue, 1), flaky.num_pipelines
    scheduler.turn(1.0, [queue.name, *tenants])
    assert queue.get_job_ids() == ids and flaky.num_pipelines - num_before < 6


def test_a_queue_that_is_new_is_scheduled_at_once(queue: Queue, flaky: FlakyRedis) -> None:
    scheduler = InlineScheduler([queue.name], flaky)
    scheduler.turn(0.0, [queue.name])
    tenants = Queue(keys.tenant_queue(queue.name, "acme"), connection=queue.connection, serializer=queue.serializer)
    ids = schedule_some(tenants, 1)
    scheduler.turn(1.0, [queue.name, tenants.name])
    assert tenants.get_job_ids() == ids


def test_dead_workers_jobs_come_back_while_another_chore_hangs(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, is_over = enqueue_many(queue, 3, max_tokens=2), threading.Event()
    Scripts().claim(
        redis_client,
        request_id="last",
        worker="dead",
        queues=[queue.name],
        max_jobs=10,
        lease_seconds=SHORT_LEASE_SECONDS,
    )
    monkeypatch.setattr(TenantQueues, "look", lambda self, now: is_over.wait(600))
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
        assert {wait_for_result(redis_client, job_id).attempts for job_id in ids} == {2}
        is_over.set()
