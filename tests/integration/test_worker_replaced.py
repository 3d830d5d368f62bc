"""A job is deleted while it runs, and another submitted under its id: that is answered, not with what the old one
came to."""

from typing import Any

import pytest
import redis
from rq import Callback, Queue, Repeat
from rq.job import Job
from rq.serializers import JSONSerializer

from producer import Client
from producer.contract import Result, keys
from tests.fakes.script_calls import beat, claim, sweep
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    rq_queue,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.running_job import RunningJob
from worker.scripts import Scripts

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


def check_is_new_behind_the_old_end(client: redis.Redis, reader: Client) -> None:
    """The old one's stream had ended when its place was taken."""
    result = wait_for_result(client, NAME)
    assert (result.status, len(result.choices[0].token_ids)) == ("finished", NEW_TOKENS)
    assert "".join(chunk.text for chunk in reader.job(NAME).stream()) == result.text
    wait_for_no_leftovers(client)


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


def test_an_old_one_that_is_replaced_as_its_end_is_decided_does_not_end_the_stream(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        full.service._leases.beat = lambda: None
        finisher = full.service._loop._finisher
        seal, is_first = finisher._seal, iter([True])

        def replace_first(job: RunningJob) -> None:
            if next(is_first, False):
                enqueue_next(Job.fetch(NAME, redis_client, JSONSerializer), redis_client)
            seal(job)

        monkeypatch.setattr(finisher, "_seal", replace_first)
        queue.enqueue(FUNCTION, job_id=NAME, prompt=REFUSED)
        check_is_new(redis_client, wait_for_result(redis_client, NAME))


@pytest.mark.parametrize("prompt", ["Old", REFUSED], ids=["success", "failure"])
def test_a_callback_that_enqueues_the_next_one_under_its_jobs_id(
    prompt: str, redis_url: str, queue: Queue, client: Client, redis_client: redis.Redis
) -> None:
    name = f"{__name__}.enqueue_next"
    with WorkerThread(redis_url, max_num_jobs=1, callbacks=name) as full:
        full.service._leases.beat = lambda: None
        callback = Callback(name)
        queue.enqueue(FUNCTION, job_id=NAME, prompt=prompt, max_tokens=5, on_success=callback, on_failure=callback)
        check_is_new_behind_the_old_end(redis_client, client)
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


@pytest.mark.parametrize("by_handlers", [False, True], ids=["in a batch", "by RQ's handlers"])
def test_an_old_one_whose_commit_is_about_to_take_effect_writes_nothing(
    by_handlers: bool,
    redis_url: str,
    queue: Queue,
    client: Client,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit has seen that its job is RQ's still."""
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        committer = full.service._loop._committer
        committer.build = lambda job: None
        add_end, is_first = committer._add_end, iter([True])

        def replace_first(*args: Any) -> None:
            if next(is_first, False):
                enqueue_next(Job.fetch(NAME, connection=redis_client, serializer=queue.serializer), redis_client)
            add_end(*args)

        monkeypatch.setattr(committer, "_add_end", replace_first)
        full.service._leases.beat = lambda: None
        repeat = Repeat(times=1) if by_handlers else None
        queue.enqueue(FUNCTION, job_id=NAME, prompt="Old", max_tokens=5, repeat=repeat)
        check_is_new_behind_the_old_end(redis_client, client)
    assert redis_client.xlen(keys.results_channel(queue.name)) == 1


def test_a_beat_keeps_its_hands_off_a_job_that_is_being_committed(
    redis_client: redis.Redis, queue: Queue, scripts: Scripts
) -> None:
    """Else a commit over a slow connection would never come to its end."""
    enqueue_new(queue)
    [held] = claim(redis_client, scripts)
    before = redis_client.hget(f"rq:job:{NAME}", "last_heartbeat")
    assert beat(redis_client, scripts, held, is_committing=True) == [b"started"]
    assert redis_client.hget(f"rq:job:{NAME}", "last_heartbeat") == before
    assert beat(redis_client, scripts, held) == [b"started"]
    assert redis_client.hget(f"rq:job:{NAME}", "last_heartbeat") != before


def test_the_next_beat_lets_go_of_the_old_one(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        start_old(full, queue).delete()
        enqueue_new(queue)
        wait_until(lambda: full.engine.running == [f"{NAME}:2"])
        full.engine.go_on()
        check_is_new(redis_client, wait_for_result(redis_client, NAME))


def test_one_that_is_cancelled_before_it_runs_has_its_outcome_from_whoever_holds_the_old_one(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """RQ tells nobody of its cancels: the next beat hears of it."""
    with WorkerThread(redis_url, max_num_jobs=1) as full:
        start_old(full, queue).delete()
        enqueue_new(queue)
        Job.fetch(NAME, redis_client, JSONSerializer).cancel()
        assert wait_for_result(redis_client, NAME).status == "cancelled"
        wait_for_no_leftovers(redis_client)


def test_what_is_left_of_the_old_one_on_another_queue_does_not_disturb_it(
    redis_url: str, queue: Queue, redis_client: redis.Redis, scripts: Scripts
) -> None:
    elsewhere = rq_queue(redis_client, f"{queue.name}:low")
    with WorkerThread(redis_url) as worker:
        start_old(worker, queue).delete()
        enqueue_new(elsewhere)
        wait_until(lambda: worker.engine.running == [f"{NAME}:2"])
        redis_client.zadd(keys.leases_key(queue.name), {NAME: 1})
        assert sweep(redis_client, scripts) == ([], []) and not redis_client.exists(keys.leases_key(queue.name))
        worker.engine.go_on()
        result = wait_for_result(redis_client, NAME)
        assert result.attempts == 2
        check_is_new(redis_client, result)
