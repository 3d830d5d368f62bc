"""Outcomes that cannot be written: a result store that is down, a commit that always raises."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.client import Pipeline
from rq import Queue
from rq.job import JobStatus

import worker.commit
import worker.uploads
from producer.contract import ErrorCode, Result, keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    held_jobs,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.errors import ResultStoreError
from worker.fence import FencedRedis
from worker.running_job import RunningJob

Threads = Iterator[WorkerThread]


class BrokenStore:
    """A result store that refuses so many puts."""

    def __init__(self, num_refusals: float) -> None:
        self.num_refusals = num_refusals
        self.puts: list[tuple[str, int]] = []

    def check(self) -> None:
        return

    def put(self, result: Result, attempt: int) -> Result:
        self.puts.append((result.job_id, attempt))
        if len(self.puts) <= self.num_refusals:
            raise ResultStoreError("the store is down")
        return result.model_copy(update={"choices": [], "stored": f"s3://bucket/{result.job_id}.{attempt}"})


def worker_with(store: BrokenStore, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> WorkerThread:
    monkeypatch.setattr(worker.uploads, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr("tests.fakes.worker_runs.select_result_store", lambda *args, **kwargs: store)
    return WorkerThread(redis_url)


def test_a_store_that_was_down_for_a_moment_costs_a_job_no_second_generation(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BrokenStore(num_refusals=2)
    with worker_with(store, redis_url, monkeypatch) as running:
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        result = wait_for_result(redis_client, job.id)
        assert result.stored == f"s3://bucket/{job.id}.1" and result.error is None
        assert store.puts == [(job.id, 1)] * 3 and running.engine.submitted == [f"{job.id}:1"]
        wait_for_no_leftovers(redis_client)


def test_a_store_that_stays_down_leaves_the_whole_result_in_redis_and_says_so(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker_with(BrokenStore(num_refusals=float("inf")), redis_url, monkeypatch):
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        result = wait_for_result(redis_client, job.id)
        assert result.status == "finished" and len(result.choices[0].token_ids) == 5 and result.stored is None
        assert result.error is not None and result.error.code is ErrorCode.RESULT_STORE_ERROR
        wait_until(lambda: job.get_status() is JobStatus.FINISHED)


def test_a_result_whose_worker_died_before_the_commit_is_stored_again_under_the_same_name(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 writes are idempotent: the attempt that finds the done entry overwrites the object with what it held."""
    with WorkerThread(redis_url) as first:
        first.service._loop._committer.build = lambda job: None
        first.service._loop._committer.commit = lambda jobs: None  # it dies just before
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        wait_until(lambda: redis_client.ttl(keys.stream_key(job.id)) > 0)
    store = BrokenStore(num_refusals=0)
    with worker_with(store, redis_url, monkeypatch) as second:
        result = wait_for_result(redis_client, job.id)
        assert store.puts == [(job.id, 1)] and result.attempts == 2
        assert second.engine.submitted == []


def test_a_stream_whose_end_a_fail_over_lost_before_the_commit_expires_all_the_same(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.commit, "MAX_BYTES_AT_ONCE", 0)
    with WorkerThread(redis_url) as running:
        committer = running.service._loop._committer
        commit = committer.commit

        def lose_the_end(jobs: list[RunningJob]) -> None:
            redis_client.persist(keys.stream_key(jobs[0].job_id))
            commit(jobs)

        committer.commit = lose_the_end  # type: ignore[assignment]
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        wait_for_result(redis_client, job.id)
        assert redis_client.ttl(keys.stream_key(job.id)) > 0


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [
        ({"result_ttl": 7 * 86400}, 6 * 86400, 7 * 86400),
        ({"result_ttl": 60, "failure_ttl": 86400}, 1, 60),
        ({"result_ttl": -1}, -1, -1),
        ({"result_ttl": 0}, keys.RESULT_TTL_SECONDS - 60, keys.RESULT_TTL_SECONDS),
        ({"failure_ttl": 7 * 86400, "prompt": ""}, 6 * 86400, 7 * 86400),
        ({"result_ttl": 7 * 86400, "prompt": ""}, 1, keys.FAILURE_TTL_SECONDS),
    ],
)
def test_a_result_is_kept_for_as_long_as_rq_keeps_the_job(
    redis_url: str, queue: Queue, redis_client: redis.Redis, fields: dict[str, Any], least: int, most: int
) -> None:
    with WorkerThread(redis_url):
        job = queue.enqueue(FUNCTION, **{"prompt": "Hello", "max_tokens": 2, **fields})
        wait_for_result(redis_client, job.id)
        assert least <= redis_client.ttl(keys.result_key(job.id)) <= most
        assert 0 < redis_client.ttl(keys.results_channel(queue.name)) <= keys.RESULT_TTL_SECONDS
        wait_for_no_leftovers(redis_client)
        if fields.get("result_ttl") != 0:
            assert abs(redis_client.expiretime(job.key) - redis_client.expiretime(keys.result_key(job.id))) <= 1


def test_a_commit_that_always_raises_ends_the_job_as_failed_with_its_output(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.commit, "FAILED_COMMIT_SECONDS", (0.01, 0.02))
    with WorkerThread(redis_url) as running:
        calls: list[str] = []

        def broken(running: RunningJob, connection: FencedRedis) -> None:
            calls.append(running.job_id)
            raise ValueError("a dependent's record is malformed")

        running.service._outcomes.handle_success = broken
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, result_ttl=0)  # which RQ's own handler commits
        result = wait_for_result(redis_client, job.id)
        assert result.status == "failed" and "malformed" in (result.error.message if result.error else "")
        assert len(result.choices[0].token_ids) == 5 and stream_text(redis_client, job.id) == result.text
        assert len(calls) == 3
        wait_for_no_leftovers(redis_client)
        assert job.get_status() is JobStatus.FAILED and queue.failed_job_registry.get_job_ids() == [job.id]
        assert "malformed" in job.latest_result().exc_string
        for key in (job.key, keys.result_key(job.id), keys.stream_key(job.id), f"rq:results:{job.id}"):
            assert redis_client.ttl(key) > 0, key


def test_output_that_cannot_be_written_down_ends_its_job_alone(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as half a surrogate pair: it would raise in the loop that all jobs share."""
    monkeypatch.setattr(worker.commit, "FAILED_COMMIT_SECONDS", (0.01,))
    with WorkerThread(redis_url) as running:
        jobs = held_jobs(running, queue, 3)
        odd = next(request for request in running.engine.requests if request.request_id.startswith(jobs[1].id))
        odd.answers, odd.script = [[0, 1]], ["fine", "\ud83d"]
        running.engine.go_on()
        results = [wait_for_result(redis_client, job.id) for job in jobs]
        assert [result.status for result in results] == ["finished", "failed", "finished"]
        assert results[1].attempts == 1 and "surrogates not allowed" in (results[1].error.message or "")  # type: ignore[union-attr]
        wait_for_no_leftovers(redis_client)
        assert redis_client.ttl(keys.stream_key(jobs[1].id)) > 0


def test_one_job_of_a_batch_that_cannot_be_committed_harms_no_other(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.commit, "FAILED_COMMIT_SECONDS", (0.01,))
    with WorkerThread(redis_url) as running:
        jobs = held_jobs(running, queue, 8)
        real = running.service._outcomes.add_success

        def broken(pipe: Pipeline, running: RunningJob, return_value: str) -> None:
            if running.job_id == jobs[3].id:
                raise ValueError("not this one")
            real(pipe, running, return_value)

        running.service._outcomes.add_success = broken
        running.engine.go_on()
        statuses = [wait_for_result(redis_client, job.id).status for job in jobs]
        assert statuses == ["finished"] * 3 + ["failed"] + ["finished"] * 4
        wait_for_no_leftovers(redis_client)


def test_one_job_of_a_batch_that_redis_does_not_take_for_long_holds_up_no_other(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a result that a proxy does not let through, of which nobody says so."""
    monkeypatch.setattr(worker.commit, "MAX_BACKOFF_SECONDS", worker.commit.MIN_BACKOFF_SECONDS)
    with WorkerThread(redis_url) as running:
        big, *others = held_jobs(running, queue, 4)
        add_success, is_cut = running.service._outcomes.add_success, [True]

        def cut(pipe: Pipeline, running: RunningJob, return_value: str) -> None:
            if running.job_id == big.id and is_cut[0]:
                raise redis.ConnectionError("Connection closed by server.")
            add_success(pipe, running, return_value)

        running.service._outcomes.add_success = cut
        running.engine.go_on()
        assert {wait_for_result(redis_client, job.id).status for job in others} == {"finished"}
        assert not redis_client.exists(keys.result_key(big.id))
        is_cut[0] = False
        assert wait_for_result(redis_client, big.id).status == "finished"
        wait_for_no_leftovers(redis_client)


def test_jobs_that_others_wait_for_are_committed_each_by_itself(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose replies are lost again and again, its retries further and further apart, holds no other up."""
    with WorkerThread(redis_url) as running:
        jobs = held_jobs(running, queue, 8)
        dependents = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, depends_on=job) for job in jobs]
        handle, is_lossy = running.service._outcomes.handle_success, True

        def lose_replies(job: Any, connection: Any) -> None:
            if is_lossy and job.job_id == jobs[0].id:
                raise redis.ConnectionError("Connection closed by server.")
            handle(job, connection)

        monkeypatch.setattr(running.service._outcomes, "handle_success", lose_replies)
        running.engine.go_on()
        for job in [*jobs[1:], *dependents[1:]]:
            assert wait_for_result(redis_client, job.id).status == "finished"
        assert redis_client.get(keys.result_key(jobs[0].id)) is None
        is_lossy = False
        for job in [jobs[0], dependents[0]]:
            assert wait_for_result(redis_client, job.id).status == "finished"
        wait_for_no_leftovers(redis_client)


def test_a_job_whose_stream_key_holds_something_else_ends_as_failed(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as running:
        job, other = held_jobs(running, queue, 2)
        redis_client.delete(keys.stream_key(job.id))
        redis_client.set(keys.stream_key(job.id), "a stranger's")
        running.engine.go_on()
        result = wait_for_result(redis_client, job.id)
        assert result.status == "failed" and "cannot be written" in (result.error.message if result.error else "")
        assert result.attempts == 1 and wait_for_result(redis_client, other.id).status == "finished"
        wait_for_no_leftovers(redis_client)
        assert job.get_status() is JobStatus.FAILED


def test_a_job_that_came_back_to_a_stream_key_that_holds_something_else_fails_alone(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as first:
        first.engine.hold_after(3)
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=60)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 1)
    redis_client.delete(keys.stream_key(job.id))
    redis_client.set(keys.stream_key(job.id), "a stranger's")
    with WorkerThread(redis_url):
        other = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        assert wait_for_result(redis_client, other.id).status == "finished"
        result = wait_for_result(redis_client, job.id)
        assert result.status == "failed" and "cannot be written" in (result.error.message if result.error else "")


def test_a_job_whose_commit_is_held_up_when_its_worker_ends_is_handed_over_with_its_outcome(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as first:

        def hold_up(pipe: Pipeline, running: RunningJob, return_value: str) -> None:
            raise redis.ConnectionError("away for the commits alone")

        first.service._outcomes.add_success = hold_up
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        wait_until(lambda: redis_client.ttl(keys.stream_key(job.id)) > 0)
    assert queue.get_job_ids() == [job.id] and not redis_client.exists(keys.leases_key(queue.name))
    with WorkerThread(redis_url) as second:
        assert wait_for_result(redis_client, job.id).status == "finished" and second.engine.submitted == []


def test_a_store_that_raises_what_it_never_should_holds_no_job_up(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BrokenStore(num_refusals=0)
    monkeypatch.setattr(store, "put", lambda result, attempt: 1 / 0)
    with worker_with(store, redis_url, monkeypatch):
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        result = wait_for_result(redis_client, job.id)
        assert result.status == "finished" and len(result.choices[0].token_ids) == 5
        assert result.error is not None and result.error.code is ErrorCode.RESULT_STORE_ERROR
