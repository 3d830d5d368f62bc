"""Cancelling, stopping, suspending: what a worker is told while it runs."""

from typing import Any

import pytest
import redis
from rq import Callback, Queue, Retry
from rq.command import send_shutdown_command, send_stop_job_command
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.worker import BaseWorker

from producer import Client
from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerThread,
    leftovers,
    stored_chunks,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)


def start_long_job(worker_thread: WorkerThread, queue: Queue, client: redis.Redis, **options: Any) -> Job:
    """A job that has put out something and goes on for long."""
    worker_thread.engine.step_seconds = 0.01
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000, **options)
    wait_until(lambda: client.xlen(keys.stream_key(job.id)) > 2)
    return job


def test_a_running_job_that_rq_cancels_keeps_its_partial_output(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = start_long_job(worker_thread, queue, redis_client)
    job.cancel()
    result = wait_for_result(redis_client, job.id)
    assert result.status == "cancelled" and result.choices[0].finish_reason == "cancelled"
    assert result.text and stream_text(redis_client, job.id) == result.text
    assert result.usage.completion_tokens == len(result.choices[0].token_ids) > 0
    assert not worker_thread.engine.running
    wait_for_no_leftovers(redis_client)
    assert job.get_status() is JobStatus.CANCELED
    assert queue.canceled_job_registry.get_job_ids() == [job.id]
    assert redis_client.ttl(job.key) > 0


def test_a_client_that_cancels_ends_a_running_job_without_a_step_or_a_beat(
    redis_url: str,
    worker_thread: WorkerThread,
    queue: Queue,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker_thread.engine.hold_after(3)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
    wait_until(lambda: len(stored_tokens(redis_client, job.id)) == 3)
    monkeypatch.setattr(worker_thread.service._leases, "beat", lambda: None)
    with Client(redis_url) as client:
        assert client.job(job.id).cancel()
        result = client.job(job.id).result(timeout=30)
    assert result.status == "cancelled" and result.choices[0].token_ids == stored_tokens(redis_client, job.id)
    assert result.usage.completion_tokens == len(result.choices[0].token_ids)
    assert not worker_thread.engine.running
    wait_for_no_leftovers(redis_client)
    for key in (job.key, keys.stream_key(job.id), keys.result_key(job.id)):
        assert redis_client.ttl(key) > 0, key
    assert job.get_status() is JobStatus.CANCELED
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


def stored_tokens(client: redis.Redis, job_id: str) -> list[int]:
    return [token_id for chunk in stored_chunks(client, job_id) for token_id in chunk.token_ids]


def test_a_job_that_the_engine_fails_as_it_is_cancelled_is_cancelled(
    redis_url: str, worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = start_long_job(worker_thread, queue, redis_client)
    worker_thread.engine.abort = lambda request_id: worker_thread.engine.fail(job.id)
    with Client(redis_url) as client:
        assert client.cancel(job.id)
    result = wait_for_result(redis_client, job.id)
    assert result.status == "cancelled" and result.error is None


def cancel_it(job: Job, connection: redis.Redis, *problem: object) -> None:
    Job.fetch(job.id, connection, JSONSerializer).cancel()


def test_a_job_that_is_cancelled_when_it_is_about_to_be_retried_is_not(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """By its own callback, say: what ends a stream, and comes before any cancel, a retry does not write."""
    name = f"{__name__}.{cancel_it.__name__}"
    with WorkerThread(redis_url, callbacks=name, lease_seconds=SHORT_LEASE_SECONDS) as worker_thread:
        job = start_long_job(worker_thread, queue, redis_client, retry=Retry(3), on_failure=Callback(name))
        worker_thread.engine.fail(job.id)
        result = wait_for_result(redis_client, job.id)
        assert result.status == "cancelled" and result.text and stream_text(redis_client, job.id) == result.text
        wait_for_no_leftovers(redis_client)
    assert job.get_status() is JobStatus.CANCELED and queue.count == 0


def test_a_cancel_on_the_channel_reaches_the_holder(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = start_long_job(worker_thread, queue, redis_client)
    redis_client.hset(job.key, "status", "canceled")
    redis_client.publish(keys.CANCEL_CHANNEL, job.id)
    assert wait_for_result(redis_client, job.id).status == "cancelled"
    wait_for_no_leftovers(redis_client)


def test_a_queued_job_that_rq_cancels_is_never_run(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    suspend(redis_client)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    job.cancel()
    resume(redis_client)
    other = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    wait_for_result(redis_client, other.id)
    assert worker_thread.engine.submitted == [f"{other.id}:1"]
    assert job.get_status() is JobStatus.CANCELED


def test_a_running_job_that_is_deleted_ends_as_cancelled(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = start_long_job(worker_thread, queue, redis_client)
    job.delete()
    assert wait_for_result(redis_client, job.id).status == "cancelled"
    wait_for_no_leftovers(redis_client)
    assert not redis_client.exists(job.key)


def test_two_of_many_jobs_are_stopped_by_command(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.hold_after(3)
    jobs = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=20) for _ in range(8)]
    wait_until(lambda: len(worker_thread.engine.running) == 8)
    for job in jobs[2:4]:
        send_stop_job_command(redis_client, job.id, serializer=queue.serializer)
        wait_for_result(redis_client, job.id)
    worker_thread.engine.go_on()
    results = [wait_for_result(redis_client, job.id) for job in jobs]
    assert [result.status for result in results] == ["finished"] * 2 + ["stopped"] * 2 + ["finished"] * 4
    assert results[2].choices[0].finish_reason == "cancelled"
    wait_for_no_leftovers(redis_client)
    assert [job.get_status() for job in jobs[2:4]] == [JobStatus.STOPPED] * 2
    assert sorted(queue.failed_job_registry.get_job_ids()) == sorted(job.id for job in jobs[2:4])


def test_a_suspended_worker_claims_nothing_and_says_so(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    suspend(redis_client)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    wait_until(lambda: [seen.get_state() for seen in BaseWorker.all(connection=redis_client)] == ["suspended"])
    assert job.get_status() is JobStatus.QUEUED
    resume(redis_client)
    assert wait_for_result(redis_client, job.id).status == "finished"


def test_rq_sees_the_worker_and_what_it_runs(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    (seen,) = BaseWorker.all(connection=redis_client)
    assert seen.name == worker_thread.name and seen.queue_names() == keys.class_queues(queue.name)
    worker_thread.engine.pause()
    jobs = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2) for _ in range(3)]
    wait_until(lambda: len(worker_thread.engine.running) == 3)
    assert sorted(execution.job_id for execution in seen.get_current_executions(refresh=True)) == sorted(
        job.id for job in jobs
    )
    assert queue.started_job_registry.count == 3
    jobs[0].refresh()
    assert jobs[0].worker_name == worker_thread.name and jobs[0].started_at is not None
    wait_until(lambda: BaseWorker.all(connection=redis_client)[0].get_state() == "busy")
    worker_thread.engine.go_on()
    wait_until(lambda: BaseWorker.all(connection=redis_client)[0].get_state() == "idle")
    wait_until(lambda: BaseWorker.all(connection=redis_client)[0].successful_job_count == 3)


def test_rqs_shutdown_command_hands_the_jobs_over(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    jobs = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2) for _ in range(3)]
    wait_until(lambda: len(worker_thread.engine.running) == 3)
    send_shutdown_command(redis_client, worker_thread.name)
    worker_thread.join()
    assert queue.get_job_ids() == [job.id for job in jobs]
    assert [job.get_status() for job in jobs] == [JobStatus.QUEUED] * 3
    assert [key for key in leftovers(redis_client) if "attempt" not in key] == []
    assert BaseWorker.all(connection=redis_client) == []
    assert redis_client.zcard(keys.WORKERS_KEY) == 0
