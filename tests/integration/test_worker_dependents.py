"""What a job's end means for others, where the worker dies or Redis' reply is lost in between: those that wait for it,
and those that wait for its slot of a rate limit."""

from typing import Any

import pytest
import redis
import rq.worker.base
from rq import Queue
from rq.job import Dependency, Job, JobStatus
from rq.rate_limit import RateLimit

import worker.rq_bridge.bridge
import worker.service
from producer import Client
from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, wait_for_no_leftovers, wait_for_result
from worker.fence import FencedPipeline, FencedRedis
from worker.rq_bridge.bridge import RqBridge, ServedQueue
from worker.rq_bridge.outcomes import Outcomes
from worker.running_job import RunningJob

REFUSED = {"prompt": ""}  # fails at once
SLOT = RateLimit("slot", 1)


def after_failure_of(job: Job) -> Dependency:
    return Dependency(jobs=[job], allow_failure=True)


def lose_the_first_reply(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a commit by RQ's handlers; a list with the number of those that were lost."""
    execute, num_lost = FencedPipeline.execute, [0]

    def lose(pipe: FencedPipeline, raise_on_error: bool = True) -> list[Any]:
        replies = execute(pipe, raise_on_error)
        if not num_lost[0]:
            num_lost[0] += 1
            pipe._owner.error = redis.ConnectionError("the reply was lost")
            raise pipe._owner.error
        return replies

    monkeypatch.setattr(FencedPipeline, "execute", lose)
    return num_lost


def test_who_may_run_after_a_failure_does_so_though_the_reply_to_the_failure_was_lost(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_thread.engine.pause()
    holder = queue.enqueue(
        FUNCTION, prompt="Hello", max_tokens=2
    )  # so that the others are there before one of them ends
    first = queue.enqueue(FUNCTION, **REFUSED, depends_on=holder)
    second = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=after_failure_of(first))
    never = queue.enqueue(FUNCTION, prompt="Hello", depends_on=first)
    wait_until(lambda: worker_thread.engine.running)
    handle = worker_thread.service._outcomes.handle_failure
    lost: list[list[int]] = []
    worker_thread.service._outcomes.handle_failure = lambda *args: (
        (lost.append(lose_the_first_reply(monkeypatch)) if not lost else None) or handle(*args)
    )
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, first.id).status == "failed"
    assert wait_for_result(redis_client, second.id).status == "finished"
    assert lost == [[1]] and redis_client.xlen(keys.results_channel(queue.name)) == 3
    assert queue.deferred_job_registry.get_job_ids() == [never.id]


def test_who_may_run_after_a_failure_is_ready_in_the_same_moment(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies right behind its commit leaves what another one finds, in a tenant's queue, too."""
    tenants = keys.tenant_queue(queue.name, "acme")
    monkeypatch.setattr(ServedQueue, "enqueue_ready_jobs_by_queue", lambda self, names: None)
    first = queue.enqueue(FUNCTION, **REFUSED)
    second = Queue(tenants, connection=redis_client, serializer=queue.serializer).enqueue(
        FUNCTION, prompt="Hello", max_tokens=2, depends_on=after_failure_of(first)
    )
    with monkeypatch.context() as dying:
        dying.setattr(Outcomes, "enqueue_ready", lambda self, names: None)
        dying.setattr(RqBridge, "clean_registries", lambda self, tenant_queues: None)  # a chore of the start, or late
        with WorkerThread(redis_url):
            wait_for_result(redis_client, first.id)
            assert redis_client.zrange(f"rq:ready:{tenants}", 0, -1) == [second.id.encode()]
    with WorkerThread(redis_url):
        assert wait_for_result(redis_client, second.id).status == "finished"
        wait_for_no_leftovers(redis_client)


def test_who_comes_to_depend_on_a_failure_in_the_midst_of_its_commit_runs(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = ServedQueue.move_dependents_to_ready
    seconds: list[Job] = []

    def meet_a_dependent(self: ServedQueue, job: Job, **options: Any) -> dict[str, list[str]]:
        names = move(self, job, **options)
        if not seconds:
            seconds.append(queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=after_failure_of(job)))
        return names

    monkeypatch.setattr(ServedQueue, "move_dependents_to_ready", meet_a_dependent)
    lost = lose_the_first_reply(monkeypatch)
    first = queue.enqueue(FUNCTION, **REFUSED)
    assert wait_for_result(redis_client, first.id).status == "failed"
    assert wait_for_result(redis_client, seconds[0].id).status == "finished" and lost == [1]


def test_a_cancel_that_came_too_late_keeps_nobody_waiting(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    first = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    second = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=first)
    wait_until(lambda: worker_thread.engine.running)
    handle = worker_thread.service._outcomes.handle_success

    def cancel_first(running: RunningJob, connection: FencedRedis) -> None:
        if running.job_id == first.id:
            first.cancel()
        handle(running, connection)

    worker_thread.service._outcomes.handle_success = cancel_first
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, first.id).status == "finished"
    assert first.get_status() is JobStatus.FINISHED and queue.canceled_job_registry.count == 0
    assert wait_for_result(redis_client, second.id).status == "finished"


@pytest.mark.parametrize("is_ours", [True, False], ids=["our client", "RQ"])
def test_a_job_that_had_ended_before_others_came_to_wait_for_it_leaves_nothing(
    is_ours: bool, worker_thread: WorkerThread, client: Client, queue: Queue, redis_client: redis.Redis
) -> None:
    ended = client.submit("Hello", max_tokens=2)
    ended.result(60)
    worker_thread.engine.pause()
    running = client.submit("Hello", max_tokens=2)
    needed = [ended.id, running.id]
    if is_ours:
        last = client.submit("Hello", max_tokens=2, depends_on=needed).id
    else:
        last = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=needed).id
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, last).status == "finished"
    assert not [key for key in redis_client.scan_iter("rq:job:*:dependents")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that look for slots all the time."""
    monkeypatch.setattr(worker.service, "SLOTS_SECONDS", 0.05)
    monkeypatch.setattr(worker.rq_bridge.bridge, "SLOTS_LOCK_MS", 40)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fields", [REFUSED, {"prompt": "Hello", "max_tokens": 2}], ids=["failed", "finished"])
def test_a_slot_that_nobody_freed_behind_the_commit_is_freed(
    fields: dict[str, Any], redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(job: Job) -> list[str]:
        raise redis.ConnectionError("the request was lost")

    monkeypatch.setattr(rq.worker.base, "release_slot", lose)
    jobs = [queue.enqueue(FUNCTION, **fields, rate_limit=SLOT) for _ in range(3)]
    with WorkerThread(redis_url):
        assert len({wait_for_result(redis_client, job.id).status for job in jobs}) == 1
        wait_for_no_leftovers(redis_client)


@pytest.mark.usefixtures("hasty")
def test_a_queued_job_that_is_cancelled_keeps_no_slot(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    first, second = (queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, rate_limit=SLOT) for _ in range(2))
    with Client(redis_url) as client:
        assert client.cancel(first.id)
    with WorkerThread(redis_url):
        assert wait_for_result(redis_client, second.id).status == "finished"


@pytest.mark.usefixtures("hasty")
def test_a_running_job_that_is_cancelled_keeps_no_slot(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url) as worker, Client(redis_url) as client:
        worker.engine.pause()
        first, second = (queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, rate_limit=SLOT) for _ in range(2))
        wait_until(lambda: worker.engine.running)
        assert client.cancel(first.id)
        worker.engine.go_on()
        assert wait_for_result(redis_client, second.id).status == "finished"
