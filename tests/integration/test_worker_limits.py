"""Deadlines, RQ's timeout and ttl: when a job may no longer run, and what it is left with."""

import time
from collections.abc import Callable

import pytest
import redis
from rq import Queue, Retry
from rq.job import Job, JobStatus

from producer.contract import ErrorCode, keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.redis_clock import RedisClock


@pytest.fixture
def overdue(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Job]:
    """A job whose deadline passes as soon as there is some of its text."""

    def overdue() -> Job:
        worker_thread.engine.step_seconds = 0.01
        deadline = time.time() + 3600
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000, deadline=deadline)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 1)
        monkeypatch.setattr(RedisClock, "now", lambda _: deadline)
        return job

    return overdue


def test_a_running_job_ends_at_its_deadline_with_what_it_has(
    worker_thread: WorkerThread, overdue: Callable[[], Job], redis_client: redis.Redis
) -> None:
    job = overdue()
    result = wait_for_result(redis_client, job.id)
    assert result.status == "finished" and result.error is None
    assert [choice.finish_reason for choice in result.choices] == ["deadline"]
    assert result.text and stream_text(redis_client, job.id) == result.text
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)
    wait_until(lambda: job.get_status() is JobStatus.FINISHED)
    assert not worker_thread.engine.running
    wait_for_no_leftovers(redis_client)


def test_a_job_that_the_engine_fails_as_it_is_stopped_at_its_deadline_is_finished_all_the_same(
    worker_thread: WorkerThread, overdue: Callable[[], Job], redis_client: redis.Redis
) -> None:
    engine = worker_thread.engine
    engine.abort = lambda request_id: engine.fail(request_id.split(":")[0])
    result = wait_for_result(redis_client, overdue().id)
    assert result.status == "finished" and result.error is None and result.text


def test_a_job_past_its_deadline_is_never_started_and_never_tried_again(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, deadline=30, retry=Retry(max=3))  # seconds from now?
    result = wait_for_result(redis_client, job.id)
    assert result.status == "failed" and result.attempts == 1
    assert result.error is not None and result.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert result.error.message.endswith("; it was 1970-01-01T00:00:30+00:00")
    assert worker_thread.engine.submitted == []
    wait_until(lambda: job.get_status() is JobStatus.FAILED)
    wait_for_no_leftovers(redis_client)


def test_a_job_without_a_token_at_its_deadline_has_failed(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, deadline=time.time() + 0.3)
    result = wait_for_result(redis_client, job.id)
    assert result.status == "failed" and result.error is not None
    assert result.error.code is ErrorCode.DEADLINE_EXCEEDED and result.usage.completion_tokens == 0
    worker_thread.engine.go_on()


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_deadline_is_held_against_redis_clock_whatever_the_workers_says(
    hours: int, redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    passed, far = (
        queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, deadline=now() + seconds) for seconds in (-60, 600)
    )
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    with WorkerThread(redis_url):
        assert [wait_for_result(redis_client, job.id).status for job in (passed, far)] == ["failed", "finished"]


def test_a_job_that_comes_back_after_its_deadline_keeps_what_it_had(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = time.time() + 3600
    with WorkerThread(redis_url) as first:
        first.engine.hold_after(3)
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000, deadline=deadline)
        wait_for_entries(redis_client, [job.id], 2)
    assert job.get_status() is JobStatus.QUEUED
    monkeypatch.setattr(RedisClock, "now", lambda _: deadline)
    with WorkerThread(redis_url) as second:
        result = wait_for_result(redis_client, job.id)
    assert second.engine.submitted == [] and result.attempts == 2
    assert result.status == "finished" and result.choices[0].finish_reason == "deadline"
    assert result.text and stream_text(redis_client, job.id) == result.text


def test_a_job_whose_ttl_passed_in_the_queue_is_taken_off_it(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Loss mode H: the hash is gone, its id stays listed; no ghost may come of it."""
    expired = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, ttl=1)
    wait_until(lambda: not redis_client.exists(expired.key))
    other = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
    with WorkerThread(redis_url) as worker:
        wait_for_result(redis_client, other.id)
        assert worker.engine.submitted == [f"{other.id}:1"] and queue.count == 0
        wait_for_no_leftovers(redis_client)
    assert not redis_client.exists(expired.key)


def test_a_job_that_is_claimed_outlives_its_ttl(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, ttl=100)
    wait_until(lambda: worker_thread.engine.running)
    assert redis_client.ttl(job.key) == -1
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, job.id).status == "finished"
