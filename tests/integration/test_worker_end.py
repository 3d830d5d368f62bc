"""A job that simply finishes: its last tokens, its done entry and its commit are one step."""

from typing import Any

import pytest
import redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job, JobStatus

import worker.commit
from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, held_jobs, stream_text, wait_for_no_leftovers, wait_for_result
from worker.running_job import RunningJob


def calls_of(redis_client: redis.Redis, running: WorkerThread, job: Job) -> dict[str, int]:
    """How often which commands ran, from the job's first token to its end."""
    redis_client.config_resetstat()
    running.engine.go_on()
    wait_for_result(redis_client, job.id)
    wait_for_no_leftovers(redis_client)
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in redis_client.info("commandstats").items()}


def test_the_done_entry_and_the_commit_of_a_job_that_simply_finishes_are_one_step(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as running:
        (job,) = held_jobs(running, queue, 1)
        calls = calls_of(redis_client, running, job)
    assert "watch" not in calls
    assert calls["mget"] <= 5  # of fences: with each token, as this engine holds none back; the end goes with the last


def test_a_commit_that_comes_behind_the_done_entry_watches_once_and_looks_once(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.commit, "MAX_BYTES_AT_ONCE", 0)
    with WorkerThread(redis_url) as running:
        (job,) = held_jobs(running, queue, 1)
        calls = calls_of(redis_client, running, job)
    assert calls["watch"] == 1


def test_a_job_that_is_cancelled_between_its_last_token_and_its_end_ends_as_cancelled(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as running:
        (job,) = held_jobs(running, queue, 1)
        build = running.service._outcomes.add_success

        def cancel_meanwhile(pipe: Pipeline, running: RunningJob, return_value: str) -> None:
            build(pipe, running, return_value)
            redis_client.hset(job.key, "status", "canceled")

        running.service._outcomes.add_success = cancel_meanwhile
        running.engine.go_on()
        result = wait_for_result(redis_client, job.id)
        assert result.status == "cancelled" and len(result.choices[0].token_ids) == 5
        assert stream_text(redis_client, job.id) == result.text
        wait_for_no_leftovers(redis_client)


def test_a_commit_that_went_with_the_done_entry_and_whose_reply_was_lost_is_not_repeated(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as running:
        (job,) = held_jobs(running, queue, 1)
        send = running.service._loop._outlet._send
        has_lost: list[bool] = []

        def lose_the_reply(runs: Any) -> Any:
            replies = send(runs)
            if not has_lost and any(append.commit is not None for run in runs for append in run):
                has_lost.append(True)
                raise redis.ConnectionError("Connection closed by server.")
            return replies

        running.service._loop._outlet._send = lose_the_reply
        running.engine.go_on()
        result = wait_for_result(redis_client, job.id)
        wait_until(lambda: not running.service._loop.held.claims())
        assert has_lost and result.status == "finished" and stream_text(redis_client, job.id) == result.text
        assert redis_client.xlen(keys.results_channel(queue.name)) == 1 and queue.get_job_ids() == []
        wait_for_no_leftovers(redis_client)


def test_what_redis_refuses_of_a_commit_costs_the_rest_of_it_nothing(
    redis_url: str, queue: Queue, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with WorkerThread(redis_url) as running:
        (job,) = held_jobs(running, queue, 1)
        redis_client.set(queue.finished_job_registry.key, "somebody else's")
        running.engine.go_on()
        assert wait_for_result(redis_client, job.id).status == "finished"
        wait_until(lambda: not running.service._loop.held.claims())
        assert job.get_status() is JobStatus.FINISHED and not redis_client.exists(keys.fence_key(job.id))
        assert f"action=commit_refused_in_part job_id={job.id} error=WRONGTYPE" in caplog.text
        redis_client.delete(queue.finished_job_registry.key)
