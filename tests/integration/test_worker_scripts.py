"""The worker's scripts on a real Redis, one by one."""

import time
from typing import Any

import pytest
import redis
from rq import Queue
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE, ExecutionRegistry
from rq.job import JobStatus

from producer.contract import keys
from producer.rq_names import execution_key_prefix, executions_key
from tests.fakes.redis_reads import sorted_set_scores
from tests.fakes.script_calls import LEASE_SECONDS, QUEUE, beat, claim, end_leases, sweep
from tests.fakes.worker_runs import enqueue_many, rq_queue
from worker.recovery import give_back
from worker.scripts import RECORD_TTL_SECONDS, Append, Scripts


def test_a_claim_takes_jobs_from_the_front_and_leaves_the_rest(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 5)
    claims = claim(redis_client, scripts, 3)
    assert [held.job_id for held in claims] == ids[:3] and queue.get_job_ids() == ids[3:]
    assert {held.attempt for held in claims} == {1}
    assert redis_client.zcard(keys.leases_key(QUEUE)) == 3
    assert redis_client.get(keys.fence_key(ids[0])) == claims[0].fence.encode()


def test_rq_shows_a_claimed_job_as_running_for_a_month_and_no_clean_up_of_its_fails_it(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    [job_id] = enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    registry = queue.started_job_registry
    registry.cleanup()
    assert registry.get_job_ids() == [job_id] and queue.failed_job_registry.get_job_ids() == []
    [execution] = ExecutionRegistry(job_id, redis_client).get_execution_ids()
    assert execution == held.execution_id
    job = queue.fetch_job(job_id)
    assert job is not None and (job.get_status(), job.worker_name) == (JobStatus.STARTED, "w")
    executions = WORKER_EXECUTIONS_KEY_TEMPLATE.format("w")
    assert redis_client.smembers(executions) == {f"{job_id}:{execution}".encode()}
    ours = (keys.fence_key(job_id), keys.attempt_key(job_id))
    for key in (execution_key_prefix(job_id) + execution, executions_key(job_id), executions, *ours):
        assert RECORD_TTL_SECONDS - 60 < redis_client.ttl(key) <= RECORD_TTL_SECONDS, key


def test_a_claim_whose_reply_was_lost_is_given_again(redis_client: redis.Redis, scripts: Scripts, queue: Queue) -> None:
    enqueue_many(queue, 5)
    first = claim(redis_client, scripts, 3)
    again = claim(redis_client, scripts, 3)
    assert [(held.job_id, held.fence) for held in again] == [(held.job_id, held.fence) for held in first]
    assert queue.count == 2
    assert len(claim(redis_client, scripts, request_id="next")) == 2


def test_a_replayed_claim_leaves_out_what_was_swept_meanwhile(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 2)
    claim(redis_client, scripts)
    redis_client.zadd(keys.leases_key(QUEUE), {ids[0]: 1})
    sweep(redis_client, scripts)
    assert [held.job_id for held in claim(redis_client, scripts)] == ids[1:]


def test_the_attempt_counts_on_from_counter_and_stream(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    counted, streamed = enqueue_many(queue, 2)
    redis_client.set(keys.attempt_key(counted), 4)
    redis_client.xadd(keys.stream_key(streamed), {"m": "{}"}, id="6-0")
    assert [held.attempt for held in claim(redis_client, scripts)] == [5, 7]


def test_a_running_job_that_is_enqueued_on_another_queue_runs_on_and_once(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    [job_id] = enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    high = rq_queue(redis_client, f"{QUEUE}:high")
    job = queue.fetch_job(job_id)
    assert job is not None
    job.worker_name = None  # as whoever made it knows it, and RQ writes it
    high.enqueue_job(job)
    assert claim(redis_client, scripts, request_id="next", queues=[high.name, QUEUE]) == [] and high.count == 0
    assert beat(redis_client, scripts, held) == [b"started"]
    assert redis_client.hmget(job.key, "origin", "worker_name") == [QUEUE.encode(), b"w"]
    end_leases(redis_client)
    high.enqueue_job(job)
    [taken] = claim(redis_client, scripts, request_id="third", queues=[high.name, QUEUE])
    assert taken.attempt == 2 and not redis_client.exists(keys.leases_key(QUEUE))


def test_entries_that_are_not_published_are_counted_as_others_are(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    appends = []
    enqueue_many(queue, 2)
    for held in claim(redis_client, scripts):
        entries = ["1-0", "{}", "1-1", "{}", "1-2", "{}"]
        key, fence_key = keys.stream_key(held.job_id), keys.fence_key(held.job_id)
        appends.append(Append(key, fence_key, held.fence, "", entries, publish=False))
    assert scripts.append(redis_client, appends) == [b"OK", b"OK"]
    assert [redis_client.xlen(append.key) for append in appends] == [3, 3]


def test_a_worker_whose_clock_is_wrong_is_alive_all_the_same(
    redis_client: redis.Redis, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else producers would refuse the models that it serves."""
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: 1e9)
        redis_client.zadd(keys.WORKERS_KEY, {"long dead": 1})
        assert beat(redis_client, scripts) == []
    assert set(sorted_set_scores(redis_client, keys.WORKERS_KEY)) == {"w"}
    assert 10 < sorted_set_scores(redis_client, keys.WORKERS_KEY)["w"] - redis_client.time()[0] <= 16


def test_a_model_is_known_for_a_week_after_its_last_worker(redis_client: redis.Redis, scripts: Scripts) -> None:
    now = redis_client.time()[0]
    week = keys.MODEL_TTL_SECONDS
    redis_client.zadd(
        keys.MODELS_KEY, {"long ago": now - week - 60, "of late": now - week + 60, "one": now - week - 60}
    )
    assert beat(redis_client, scripts, models=["one", "two"]) == []
    known = sorted_set_scores(redis_client, keys.MODELS_KEY)
    assert set(known) == {"of late", "one", "two"} and known["one"] >= now
    assert week - 10 < redis_client.ttl(keys.MODELS_KEY) <= week, "where no worker comes back, nothing stays"


def test_a_claim_drops_only_so_many_jobs_that_are_gone(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    redis_client.rpush(queue.key, *(f"gone-{number}" for number in range(1500)))
    ids = enqueue_many(queue, 2)
    assert claim(redis_client, scripts) == [] and queue.count == 502
    assert [held.job_id for held in claim(redis_client, scripts, request_id="next")] == ids and queue.count == 0


def test_a_job_that_is_gone_costs_its_tenant_no_turn(redis_client: redis.Redis, scripts: Scripts) -> None:
    names = [f"{QUEUE}@{tenant}" for tenant in "ab"]
    for name in names:
        enqueue_many(rq_queue(redis_client, name), 2)
    redis_client.lpush(f"rq:queue:{names[0]}", "gone")
    claims = claim(redis_client, scripts, 3, tenant_queues=names)
    assert [held.queue for held in claims] == [names[0], names[1], names[0]]


def test_a_sweep_takes_only_so_many_jobs(redis_client: redis.Redis, scripts: Scripts, queue: Queue) -> None:
    enqueue_many(queue, 3)
    claim(redis_client, scripts)
    end_leases(redis_client)
    options: dict[str, Any] = {"queue": QUEUE, "lease_seconds": LEASE_SECONDS, "max_jobs": 2, "execution_id": "s"}
    assert [len(scripts.sweep(redis_client, **options)[0]) for _ in range(3)] == [2, 1, 0]


def test_a_hand_over_doubles_no_job_that_was_enqueued_anew(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    [job_id] = enqueue_many(queue, 1)
    claims = claim(redis_client, scripts)
    job = queue.fetch_job(job_id)
    assert job is not None
    queue.enqueue_job(job)
    assert give_back(redis_client, scripts, claims) == 0
    assert queue.get_job_ids() == [job_id] and not redis_client.exists(keys.fence_key(job_id))


def test_a_beat_leaves_nothing_of_a_job_that_has_ended(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """Its own commit, say, whose reply is still on the way."""
    [job_id] = enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    redis_client.hset(f"rq:job:{job_id}", "status", "finished")
    redis_client.delete(keys.fence_key(job_id), keys.attempt_key(job_id))
    assert beat(redis_client, scripts, held) == [b"lost"]
    assert not redis_client.exists(keys.attempt_key(job_id))


def test_a_heartbeat_renews_what_is_ours_and_tells_what_is_not(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    enqueue_many(queue, 3)
    kept, cancelled, lost = claim(redis_client, scripts)
    redis_client.hset(f"rq:job:{cancelled.job_id}", "status", "canceled")
    redis_client.set(keys.fence_key(lost.job_id), "2:other")
    end_leases(redis_client)
    assert beat(redis_client, scripts, kept, cancelled, lost) == [b"started", b"canceled", b"lost"]
    leases = sorted_set_scores(redis_client, keys.leases_key(QUEUE))
    assert leases[kept.job_id] > time.time() and leases[lost.job_id] == 1


def test_rq_sees_when_a_job_was_heard_of_last(redis_client: redis.Redis, scripts: Scripts, queue: Queue) -> None:
    enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    job, execution = f"rq:job:{held.job_id}", execution_key_prefix(held.job_id) + held.execution_id
    for key in (job, execution):
        redis_client.hset(key, "last_heartbeat", "long ago")
    assert beat(redis_client, scripts, held) == [b"started"]
    assert all(redis_client.hget(key, "last_heartbeat") != b"long ago" for key in (job, execution))
    redis_client.delete(execution)
    assert beat(redis_client, scripts, held) == [b"started"]
    assert not redis_client.exists(execution), "what is gone stays so"
