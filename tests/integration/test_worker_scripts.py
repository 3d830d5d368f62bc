"""The worker's scripts on a real Redis, one by one."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import JobStatus

from producer.contract import keys
from tests.fakes.worker_runs import enqueue_many, leftovers, rq_queue
from worker.claim import Claim
from worker.recovery import Sweeper, give_back
from worker.scripts import Append, Scripts

QUEUE = keys.DEFAULT_QUEUE
LEASE_SECONDS = 30.0


@pytest.fixture
def scripts(redis_client: redis.Redis) -> Scripts:
    scripts = Scripts("rq")
    scripts.load_append(redis_client)
    return scripts


def claim(
    client: redis.Redis, scripts: Scripts, max_jobs: int = 100, *, request_id: str = "request", **options: Any
) -> list[Claim]:
    arguments = {"worker": "w", "queues": [QUEUE], "lease_seconds": LEASE_SECONDS, **options}
    reply = scripts.claim(client, request_id=request_id, max_jobs=max_jobs, **arguments)
    assert reply is not None
    return [Claim.parse(entry, time.time()) for entry in reply[0]]


def beat(client: redis.Redis, scripts: Scripts, *claims: Claim, models: Sequence[str] = ("m",)) -> list[bytes]:
    flat = [part for held in claims for part in (held.queue, held.job_id, held.fence)]
    entry: dict[str, Any] = {"worker": "w", "entry_seconds": 15, "models": models}
    return list(scripts.beat(client, **entry, lease_seconds=LEASE_SECONDS, jobs=flat))


def sweep(client: redis.Redis, scripts: Scripts) -> tuple[list[str], list[Claim]]:
    given, orphans = scripts.sweep(client, queue=QUEUE, lease_seconds=LEASE_SECONDS, max_jobs=100, execution_id="s")
    return [job_id.decode() for job_id in given], [Claim.parse(orphan, time.time()) for orphan in orphans]


def end_leases(client: redis.Redis) -> None:
    for job_id in client.zrange(keys.leases_key(QUEUE), 0, -1):
        client.zadd(keys.leases_key(QUEUE), {job_id: 1})


def test_a_claim_takes_jobs_from_the_front_and_leaves_the_rest(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    ids = enqueue_many(queue, 5)
    claims = claim(redis_client, scripts, 3)
    assert [held.job_id for held in claims] == ids[:3] and queue.get_job_ids() == ids[3:]
    assert {held.attempt for held in claims} == {1}
    assert redis_client.zcard(keys.leases_key(QUEUE)) == 3
    assert redis_client.get(keys.fence_key(ids[0])) == claims[0].fence.encode()


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


@pytest.mark.parametrize("how", ["hand-over", "sweep", "sweep of one cancelled"])
def test_an_attempt_that_had_to_start_over_and_wrote_nothing_leaves_that_to_the_next(
    how: str, redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """Else the run before, which may have ended, would count as this one's."""
    [job_id] = enqueue_many(queue, 1)
    redis_client.xadd(keys.stream_key(job_id), {"d": '{"done":true}'}, id="1-1")
    [held] = claim(redis_client, scripts)
    for request, writes_marker in (("second", False), ("third", True)):
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
    assert [held.job_id for held in claim(redis_client, scripts, request_id="next")] == [stranded, enqueued]


def test_a_running_job_that_is_enqueued_on_another_queue_runs_on_and_once(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    [job_id] = enqueue_many(queue, 1)
    [held] = claim(redis_client, scripts)
    high = rq_queue(redis_client, f"{QUEUE}:high")
    job = queue.fetch_job(job_id)
    assert job is not None
    high.enqueue_job(job)
    assert claim(redis_client, scripts, request_id="next", queues=[high.name, QUEUE]) == [] and high.count == 0
    assert beat(redis_client, scripts, held) == [b"started"]
    assert redis_client.hget(job.key, "origin") == QUEUE.encode()
    end_leases(redis_client)
    high.enqueue_job(job)
    [taken] = claim(redis_client, scripts, request_id="third", queues=[high.name, QUEUE])
    assert taken.attempt == 2 and not redis_client.exists(keys.leases_key(QUEUE))


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
        last = redis_client.xrevrange(key, count=1)[0][0].decode()
        marker = [f"{held.attempt}-0", "{}"]
        scripts.append(redis_client, [Append(key, fence_key, held.fence, last, marker, publish=False)])
        assert redis_client.ttl(key) == -1


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
        assert beat(redis_client, scripts) == []
    assert 10 < redis_client.zscore(keys.WORKERS_KEY, "w") - redis_client.time()[0] <= 16


def test_a_model_is_known_for_a_week_after_its_last_worker(redis_client: redis.Redis, scripts: Scripts) -> None:
    now = redis_client.time()[0]
    week = keys.MODEL_TTL_SECONDS
    redis_client.zadd(
        keys.MODELS_KEY, {"long ago": now - week - 60, "of late": now - week + 60, "one": now - week - 60}
    )
    assert beat(redis_client, scripts, models=["one", "two"]) == []
    known = dict(redis_client.zrange(keys.MODELS_KEY, 0, -1, withscores=True))
    assert set(known) == {b"of late", b"one", b"two"} and known[b"one"] >= now
    assert week - 10 < redis_client.ttl(keys.MODELS_KEY) <= week, "where no worker comes back, nothing stays"


def test_a_claim_drops_only_so_many_jobs_that_are_gone(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    redis_client.rpush(queue.key, *(f"gone-{number}" for number in range(1500)))
    ids = enqueue_many(queue, 2)
    assert claim(redis_client, scripts) == [] and queue.count == 502
    assert [held.job_id for held in claim(redis_client, scripts, request_id="next")] == ids and queue.count == 0


def test_a_live_lease_is_not_swept(redis_client: redis.Redis, scripts: Scripts, queue: Queue) -> None:
    enqueue_many(queue, 2)
    claim(redis_client, scripts)
    assert sweep(redis_client, scripts) == ([], [])


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
    assert sweep(redis_client, scripts) == ([], [])
    assert beat(redis_client, scripts, *orphans) == [b"" if held.job_id == deleted else b"canceled" for held in orphans]


def test_an_attempt_whose_claim_redis_lost_is_not_counted_twice(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """After a fail-over: else the next one's entries had the ids of what was shown already."""
    [job_id] = enqueue_many(queue, 1)
    before = {name: redis_client.dump(name) for name in redis_client.scan_iter()}
    [lost] = claim(redis_client, scripts)
    redis_client.flushall()
    for name, value in before.items():
        redis_client.restore(name, 0, value)
    assert beat(redis_client, scripts, lost) == [b"lost"]
    [again] = claim(redis_client, scripts)
    assert (again.job_id, lost.attempt, again.attempt) == (job_id, 1, 2)
    assert beat(redis_client, scripts, lost, again) == [b"lost", b"started"]


def test_an_attempt_whose_claim_redis_lost_with_the_hand_over_before_it_is_not_counted_twice(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """The job is then held by the worker that has given it back."""
    [job_id] = enqueue_many(queue, 1)
    [gone] = claim(redis_client, scripts)
    before = {name: redis_client.dump(name) for name in redis_client.scan_iter()}
    assert give_back(redis_client, scripts, [gone]) == 1
    [lost] = claim(redis_client, scripts, request_id="second")
    redis_client.flushall()
    for name, value in before.items():
        redis_client.restore(name, 0, value)
    assert beat(redis_client, scripts, lost) == [b"lost"]
    end_leases(redis_client)
    assert sweep(redis_client, scripts)[0] == [job_id]
    [again] = claim(redis_client, scripts, request_id="third")
    assert (gone.attempt, lost.attempt, again.attempt) == (1, 2, 3)


def test_a_heartbeat_renews_what_is_ours_and_tells_what_is_not(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    enqueue_many(queue, 3)
    kept, cancelled, lost = claim(redis_client, scripts)
    redis_client.hset(f"rq:job:{cancelled.job_id}", "status", "canceled")
    redis_client.set(keys.fence_key(lost.job_id), "2:other")
    end_leases(redis_client)
    assert beat(redis_client, scripts, kept, cancelled, lost) == [b"started", b"canceled", b"lost"]
    assert redis_client.zscore(keys.leases_key(QUEUE), kept.job_id) > time.time()
    assert redis_client.zscore(keys.leases_key(QUEUE), lost.job_id) == 1


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
