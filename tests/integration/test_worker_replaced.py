"""A job is deleted while it runs, and another submitted under its id: that is answered, not with what the old one
came to."""

from typing import Any

import pytest
import redis
from rq import Callback, Queue
from rq.job import Job

from producer import Client
from producer.contract import Result, keys
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    rq_queue,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
    wait_until,
)

NAME = "x"
NEW_TOKENS = 9  # the old one has 5
REFUSED = ""  # as a prompt


def start_old(running: WorkerThread, queue: Queue) -> Job:
    """It runs, and puts out nothing until the engine goes on."""
    running.engine.pause()
    job = queue.enqueue(FUNCTION, job_id=NAME, prompt="Old", max_tokens=5, seed=1)
    wait_until(lambda: running.engine.running)
    return job


def enqueue_new(queue: Queue) -> None:
    queue.enqueue(FUNCTION, job_id=NAME, prompt="New", max_tokens=NEW_TOKENS, seed=1)


def check_is_new(client: redis.Redis, result: Result) -> None:
    assert (result.status, len(result.choices[0].token_ids)) == ("finished", NEW_TOKENS)
    assert stream_text(client, NAME) == result.text
    wait_for_no_leftovers(client)


def test_it_runs_beside_what_is_left_of_the_old_one(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    start_old(worker_thread, queue).delete()
    enqueue_new(queue)
    wait_until(lambda: worker_thread.engine.running == [f"{NAME}:2"])
    worker_thread.engine.go_on()
    check_is_new(redis_client, wait_for_result(redis_client, NAME))
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


def test_a_client_submits_it_under_the_same_key(
    worker_thread: WorkerThread, client: Client, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    old = client.submit("Old", max_tokens=5, idempotency_key="key")
    wait_until(lambda: worker_thread.engine.running)
    Job.fetch(old.id, connection=redis_client, serializer=rq_queue(redis_client).serializer).delete()
    new = client.submit("New", max_tokens=NEW_TOKENS, idempotency_key="key")
    worker_thread.engine.go_on()
    assert new.id == old.id and len(new.result(60).choices[0].token_ids) == NEW_TOKENS


@pytest.mark.parametrize("is_built_at_once", [True, False], ids=["at once", "step by step"])
def test_an_old_one_that_ends_before_it_is_claimed_writes_nothing(
    is_built_at_once: bool, redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        if not is_built_at_once:
            full.service._loop._committer.build = lambda job: None
        full.service._leases.beat = lambda: None
        start_old(full, queue).delete()
        enqueue_new(queue)
        full.engine.go_on()
        check_is_new(redis_client, wait_for_result(redis_client, NAME))
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


def enqueue_next(job: Job, connection: redis.Redis, *outcome: Any) -> None:
    job.delete()
    enqueue_new(rq_queue(connection))


@pytest.mark.parametrize("prompt", ["Old", REFUSED], ids=["success", "failure"])
def test_a_callback_that_enqueues_the_next_one_under_its_jobs_id(
    prompt: str, redis_url: str, queue: Queue, client: Client, redis_client: redis.Redis
) -> None:
    name = f"{__name__}.enqueue_next"
    with WorkerThread(redis_url, max_num_jobs=1, callbacks=name) as full:
        full.service._leases.beat = lambda: None
        callback = Callback(name)
        queue.enqueue(FUNCTION, job_id=NAME, prompt=prompt, max_tokens=5, on_success=callback, on_failure=callback)
        result = wait_for_result(redis_client, NAME)
        assert (result.status, len(result.choices[0].token_ids)) == ("finished", NEW_TOKENS)
        assert "".join(chunk.text for chunk in client.job(NAME).stream()) == result.text
        wait_for_no_leftovers(redis_client)
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


def test_the_next_beat_lets_go_of_the_old_one(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        start_old(full, queue).delete()
        enqueue_new(queue)
        wait_until(lambda: full.engine.running == [f"{NAME}:2"])
        full.engine.go_on()
        check_is_new(redis_client, wait_for_result(redis_client, NAME))


def test_what_is_left_of_the_old_one_on_another_queue_does_not_disturb_it(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    elsewhere = rq_queue(redis_client, f"{queue.name}:low")
    with WorkerThread(redis_url) as worker:
        start_old(worker, queue).delete()
        enqueue_new(elsewhere)
        wait_until(lambda: worker.engine.running == [f"{NAME}:2"])
        redis_client.zadd(keys.leases_key(queue.name), {NAME: 1})
        wait_until(lambda: not redis_client.exists(keys.leases_key(queue.name)))
        worker.engine.go_on()
        result = wait_for_result(redis_client, NAME)
        assert result.attempts == 2
        check_is_new(redis_client, result)
