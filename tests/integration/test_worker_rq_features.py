"""What RQ offers beside running a job, through our worker: Retry, dependents, callbacks, webhooks, schedules."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import redis
from redis.client import Pipeline
from rq import Callback, Queue, Repeat, Retry
from rq.job import Job, JobStatus
from rq.registry import ReadyJobRegistry
from rq.webhook import Webhook

from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, rq_queue, wait_for_no_leftovers, wait_for_result
from worker.running_job import RunningJob


def fail_once(worker: WorkerThread, queue: Queue, retry: Retry) -> Job:
    """A job whose first attempt fails; the engine is paused, so that the next does not end."""
    worker.engine.pause()
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, retry=retry)
    wait_until(lambda: worker.engine.running)
    worker.engine.fail(job.id)
    return job


def test_retry_runs_a_failed_job_again_from_the_start(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = fail_once(worker_thread, queue, Retry(max=2))
    wait_until(lambda: worker_thread.engine.running == [f"{job.id}:2"])
    assert redis_client.exists(keys.result_key(job.id)) == 0
    worker_thread.engine.go_on()
    result = wait_for_result(redis_client, job.id)
    assert result.status == "finished" and result.attempts == 2
    wait_until(lambda: job.get_status() is JobStatus.FINISHED)
    wait_for_no_leftovers(redis_client)


def test_retry_with_an_interval_comes_back_through_the_scheduler(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = fail_once(worker_thread, queue, Retry(max=1, interval=1))
    wait_until(lambda: worker_thread.engine.running == [f"{job.id}:2"])
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, job.id).attempts == 2


def test_nothing_stays_for_ever_of_a_job_that_waits_to_be_retried_and_is_deleted(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = fail_once(worker_thread, queue, Retry(max=1, interval=3600))
    wait_until(lambda: job.get_status() is JobStatus.SCHEDULED)
    assert redis_client.ttl(keys.stream_key(job.id)) > 0


def test_a_job_that_fails_once_more_than_its_retries_is_failed(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, retry=Retry(max=1))
    for attempt in (1, 2):
        wait_until(lambda: worker_thread.engine.running == [f"{job.id}:{attempt}"])  # noqa: B023
        worker_thread.engine.fail(job.id)
    assert wait_for_result(redis_client, job.id).attempts == 2
    wait_until(lambda: job.get_status() is JobStatus.FAILED)
    wait_for_no_leftovers(redis_client)


def test_a_job_that_comes_to_depend_on_another_in_the_midst_of_its_commit_is_enqueued_with_it(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Whatever the worker does next: its death between a commit and its dependents would leave these waiting."""
    with WorkerThread(redis_url) as worker:
        outcomes = worker.service._outcomes
        seconds: list[Job] = []
        add_success = outcomes.add_success

        def meet_a_dependent(pipe: Pipeline, running: RunningJob, return_value: str) -> None:
            if not seconds:
                seconds.append(queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, depends_on=running.job_id))
            add_success(pipe, running, return_value)

        outcomes.add_success = meet_a_dependent
        first = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        assert wait_for_result(redis_client, first.id).status == "finished"
        assert wait_until(lambda: seconds and redis_client.hget(seconds[0].key, "enqueued_at")), "in one transaction"
        assert wait_for_result(redis_client, seconds[0].id).status == "finished"
        wait_for_no_leftovers(redis_client)
    assert redis_client.xlen(keys.results_channel(queue.name)) == 2


def test_a_dependent_job_runs_after_the_one_it_waits_for(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    first = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
    second = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, depends_on=first)
    wait_until(lambda: worker_thread.engine.running == [f"{first.id}:1"])
    assert second.get_status() is JobStatus.DEFERRED
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, second.id).status == "finished"
    wait_until(lambda: second.get_status() is JobStatus.FINISHED)
    assert first.get_status() is JobStatus.FINISHED
    wait_for_no_leftovers(redis_client)


def add_ready_dependent(redis_client: redis.Redis, tenant: str) -> Job:
    """As one who died between a commit and the enqueueing of its dependents leaves one. It is a tenant's: RQ's own
    maintenance, which a worker runs on another thread, leaves their queues alone."""
    queue = rq_queue(redis_client, keys.tenant_queue(keys.DEFAULT_QUEUE, tenant))
    kwargs = {"prompt": "Hello", "max_tokens": 2, "tenant": tenant}
    job = queue.create_job(FUNCTION, kwargs=kwargs, status=JobStatus.READY_TO_ENQUEUE)
    job.save()
    queue.ready_job_registry.add(job)
    return job


def test_a_dependent_whose_enqueueing_was_cut_short_is_enqueued(
    worker_thread: WorkerThread, redis_client: redis.Redis
) -> None:
    job = add_ready_dependent(redis_client, "acme")
    worker_thread.service._outcomes.enqueue_ready([job.origin])
    assert job.get_status() is not JobStatus.READY_TO_ENQUEUE
    assert wait_for_result(redis_client, job.id).status == "finished"


def test_nobody_goes_to_queues_where_no_dependent_is_ready(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[str] = []  # on this thread: the worker's own maintenance goes through its queues on another
    caller = threading.current_thread()

    def note_visit(self: ReadyJobRegistry) -> None:
        if threading.current_thread() is caller:
            visits.append(self.name)

    monkeypatch.setattr(ReadyJobRegistry, "cleanup", note_visit)
    tenants = [keys.tenant_queue(queue.name, f"tenant{number}") for number in range(1000)]
    worker_thread.service._outcomes.enqueue_ready(tenants)
    assert not visits
    add_ready_dependent(redis_client, "tenant7")
    worker_thread.service._outcomes.enqueue_ready(tenants)
    assert visits == [tenants[7]]


def test_a_callback_that_is_not_allowed_is_refused_and_never_called(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", on_success=Callback("os.abort"), on_failure=Callback("os.abort"))
    result = wait_for_result(redis_client, job.id)
    assert result.error is not None and "os.abort" in result.error.message and "--callbacks" in result.error.message


def test_a_webhook_that_is_not_allowed_is_refused(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", webhooks=[Webhook("http://10.0.0.1/x", "finished")])
    result = wait_for_result(redis_client, job.id)
    assert result.error is not None and "10.0.0.1" in result.error.message


called_back: list[str] = []


def note_success(job: Job, connection: redis.Redis, result: dict[str, Any]) -> None:
    called_back.append(result["status"])


def test_an_allowed_callback_is_called(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    called_back.clear()
    name = f"{__name__}.note_success"
    with WorkerThread(redis_url, callbacks=name):
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, on_success=Callback(name))
        wait_for_result(redis_client, job.id)
    assert called_back == ["finished"]


def test_a_scheduled_job_runs_when_it_is_due(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue_in(timedelta(seconds=1), FUNCTION, prompt="Hello", max_tokens=2)
    assert wait_for_result(redis_client, job.id).status == "finished"


def test_a_repeated_job_runs_as_often_as_asked(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, repeat=Repeat(times=2))
    wait_until(lambda: len(job.results()) == 3)
    wait_for_no_leftovers(redis_client)
