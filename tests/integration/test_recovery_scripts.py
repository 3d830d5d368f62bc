"""Leases that end on a real Redis: what a sweep and a hand-over bring back, in what order, and when sweepers wait."""

import time

import pytest
import redis
from rq import Queue
from rq.job import JobStatus

from producer.contract import keys
from tests.fakes.redis_reads import stream_rows
from tests.fakes.script_calls import QUEUE, beat, claim, end_leases, sweep
from tests.fakes.worker_runs import FUNCTION, enqueue_many, leftovers
from worker.recovery import Sweeper, give_back
from worker.scripts import BLAMED_FIELD, CRASHES_FIELD, Append, Scripts


def test_swept_jobs_come_back_to_the_front_in_the_order_of_their_claims(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 20)
    for request in ("a", "b", "c"):
        claim(redis_client, scripts, 5, request_id=request)
    end_leases(redis_client)
    returned, orphans = sweep(redis_client, scripts)
    assert sorted(returned) == sorted(ids[:15]) and orphans == []
    assert queue.get_job_ids() == ids
    assert [key for key in leftovers(redis_client) if "attempt" not in key] == []
    job = queue.fetch_job(ids[0])
    assert job is not None and job.get_status() is JobStatus.QUEUED and not job.worker_name and job.started_at is None


def test_a_job_that_came_back_is_resumable_and_one_that_rq_requeued_is_not(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    swept, requeued = enqueue_many(queue, 2)
    claim(redis_client, scripts)
    end_leases(redis_client)
    sweep(redis_client, scripts)
    job = queue.fetch_job(requeued)
    assert job is not None
    queue.remove(requeued)
    queue.enqueue_job(job)
    claims = {held.job_id: held for held in claim(redis_client, scripts, request_id="next")}
    assert claims[swept].is_resumable and not claims[requeued].is_resumable
    assert {held.attempt for held in claims.values()} == {2}


def test_a_job_that_is_given_back_to_start_over_does_so_though_it_had_come_back_to_be_resumed(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    for request, resumable in (("second", True), ("third", False), ("fourth", True)):
        redis_client.xadd(keys.stream_key(held.job_id), {"m": "{}"}, id=f"{held.attempt}-0")
        assert give_back(redis_client, scripts, [held], resumable=resumable) == 1
        [held] = claim(redis_client, scripts, request_id=request)
        assert held.is_resumable is resumable


@pytest.mark.parametrize("how", ["hand-over", "sweep", "sweep of one cancelled"])
def test_an_attempt_that_had_to_start_over_and_wrote_nothing_leaves_that_to_the_next(
    how: str, redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """Else the run before, which may have ended, would count as this one's."""
    [job_id] = enqueue_many(queue, 1)
    redis_client.xadd(keys.stream_key(job_id), {"d": '{"done":true}'}, id="1-1")
    [held] = claim(redis_client, scripts)
    for request, writes_marker in (("second", False), ("third", False), ("fourth", True)):
        if writes_marker:
            redis_client.xadd(keys.stream_key(job_id), {"m": "{}"}, id=f"{held.attempt}-0")
        if how == "hand-over":
            assert give_back(redis_client, scripts, [held]) == 1
            [held] = claim(redis_client, scripts, request_id=request)
        elif how == "sweep":
            end_leases(redis_client)
            assert sweep(redis_client, scripts)[0] == [job_id]
            [held] = claim(redis_client, scripts, request_id=request)
        else:
            redis_client.hset(f"rq:job:{job_id}", "status", "canceled")
            end_leases(redis_client)
            [held] = sweep(redis_client, scripts)[1]
        assert held.is_resumable is writes_marker


def test_a_job_whose_claim_broke_off_comes_back_once_and_one_enqueued_again_is_not_doubled(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    stranded, enqueued = enqueue_many(queue, 2)
    claim(redis_client, scripts)
    for job_id in (stranded, enqueued):
        redis_client.hset(f"rq:job:{job_id}", "status", "queued")
    redis_client.rpush(queue.key, enqueued)
    end_leases(redis_client)
    assert sweep(redis_client, scripts) == ([stranded], [])
    assert queue.get_job_ids() == [stranded, enqueued]
    assert [key for key in leftovers(redis_client) if "attempt" not in key] == []
    assert [held.job_id for held in claim(redis_client, scripts, request_id="next")] == [stranded, enqueued]


def test_the_stream_of_a_job_that_came_back_is_kept_for_ever_only_from_its_next_marker_on(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    [job_id] = enqueue_many(queue, 1)
    key = keys.stream_key(job_id)
    [held] = claim(redis_client, scripts)
    fence_key = keys.fence_key(job_id)
    begun = ["1-0", "{}", "1-1", "{}"]
    scripts.append(redis_client, [Append(key, fence_key, held.fence, "", begun, publish=False)])
    assert redis_client.ttl(key) == -1
    for request in ("second", "third"):
        if request == "second":
            assert give_back(redis_client, scripts, [held]) == 1
        else:
            end_leases(redis_client)
            assert sweep(redis_client, scripts)[0] == [job_id]
        assert redis_client.ttl(key) > 0, "nobody may ever come for it"
        [held] = claim(redis_client, scripts, request_id=request)
        last = stream_rows(redis_client, key)[-1][0].decode()
        marker = [f"{held.attempt}-0", "{}"]
        scripts.append(redis_client, [Append(key, fence_key, held.fence, last, marker, publish=False)])
        assert redis_client.ttl(key) == -1


def test_a_live_lease_is_not_swept(redis_client: redis.Redis, scripts: Scripts, queue: Queue) -> None:
    enqueue_many(queue, 2)
    claim(redis_client, scripts)
    assert sweep(redis_client, scripts) == ([], [])


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lease_ends_by_redis_clock_whatever_its_holders_and_its_sweepers_say(
    hours: int, redis_client: redis.Redis, scripts: Scripts, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, now = enqueue_many(queue, 2), time.time

    def put_forward(by_hours: int) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + 3600 * by_hours)

    put_forward(hours)
    beat(redis_client, scripts, *claim(redis_client, scripts))
    put_forward(-hours)
    assert sweep(redis_client, scripts) == ([], [])
    end_leases(redis_client)
    put_forward(hours)
    assert sorted(sweep(redis_client, scripts)[0]) == sorted(ids)
    put_forward(-hours)
    again = claim(redis_client, scripts, request_id="again")
    assert [(held.attempt, held.is_resumable) for held in again] == [(2, True)] * 2


def test_a_cancelled_job_of_a_dead_worker_is_leased_to_the_sweeper(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    cancelled, deleted = enqueue_many(queue, 2)
    claim(redis_client, scripts)
    redis_client.hset(f"rq:job:{cancelled}", "status", "canceled")
    redis_client.delete(f"rq:job:{deleted}")
    end_leases(redis_client)
    returned, orphans = sweep(redis_client, scripts)
    assert returned == [] and {held.job_id for held in orphans} == {cancelled, deleted}
    assert all(held.is_orphan and held.attempt == 2 for held in orphans)
    executions = {key for key in leftovers(redis_client) if "execution" in key or "wip" in key}
    assert executions == {f"rq:execution:{held.job_id}:{held.execution_id}" for held in orphans}
    assert sweep(redis_client, scripts) == ([], [])
    assert beat(redis_client, scripts, *orphans) == [b"" if held.job_id == deleted else b"canceled" for held in orphans]


@pytest.mark.parametrize("counted", [None, "x", "1"])
def test_a_record_that_blames_an_attempt_and_does_not_count_it_costs_no_beat(
    counted: str | None, redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """Anybody may have written it; the worker's other jobs would lose their leases."""
    [job_id] = enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    redis_client.hset(f"rq:job:{job_id}", BLAMED_FIELD, f"{held.attempt} ")
    if counted is not None:
        redis_client.hset(f"rq:job:{job_id}", CRASHES_FIELD, counted)
    redis_client.set(keys.fence_key(job_id), "2:other")
    assert beat(redis_client, scripts, held, was_away=True) == [b"lost"]


@pytest.mark.parametrize("how", ["hand-over", "sweep"])
def test_a_job_that_was_claimed_in_time_waits_for_its_next_attempt_however_short_its_ttl(
    how: str, redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", ttl=100)
    [held] = claim(redis_client, scripts)
    if how == "hand-over":
        assert give_back(redis_client, scripts, [held]) == 1
    else:
        end_leases(redis_client)
        assert sweep(redis_client, scripts)[0] == [job.id]
    assert queue.get_job_ids() == [job.id] and redis_client.ttl(job.key) == -1


def test_a_hand_over_gives_back_only_what_is_still_ours(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 4)
    claims = claim(redis_client, scripts)
    redis_client.set(keys.fence_key(ids[1]), "2:other")
    redis_client.hset(f"rq:job:{ids[2]}", "status", "canceled")
    assert give_back(redis_client, scripts, claims) == 2
    assert queue.get_job_ids() == [ids[0], ids[3]]
    returned, orphans = sweep(redis_client, scripts)  # the cancelled one's outcome is owed
    assert returned == [] and [held.job_id for held in orphans] == [ids[2]]
    assert give_back(redis_client, scripts, claims) == 0


def test_sweepers_wait_a_full_lease_at_the_start_and_after_a_gap(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 1)
    claim(redis_client, scripts)
    end_leases(redis_client)
    sweeper = Sweeper(redis_client, scripts, queues=[QUEUE], lease_seconds=10, on_orphan=print)
    for now in (100.0, 104.0, 109.0):
        sweeper.sweep(now)
        assert queue.count == 0
    sweeper.sweep(120.0)  # it slept: leases may only look ended
    assert queue.count == 0
    for now in (124.0, 128.0, 130.0):
        sweeper.sweep(now)
    assert queue.get_job_ids() == ids


def test_sweepers_wait_a_full_lease_after_redis_clock_was_put_forward(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a fail-over to a machine whose clock is ahead: no holder could have renewed its lease in between."""
    ids = enqueue_many(queue, 1)
    claim(redis_client, scripts)
    end_leases(redis_client)
    sweeper = Sweeper(redis_client, scripts, queues=[QUEUE], lease_seconds=10, on_orphan=print)
    clock = 1e9
    monkeypatch.setattr(sweeper, "_write", lambda: clock)
    for now in (100.0, 104.0, 109.0):
        clock += 4.0
        sweeper.sweep(now)
    clock += 60.0
    for now in (111.0, 115.0, 120.0):
        clock += 4.0
        sweeper.sweep(now)
        assert queue.count == 0
    sweeper.sweep(122.0)
    assert queue.get_job_ids() == ids
