"""Attempts whose claim Redis has lost, as by a fail-over: none is counted twice."""

import redis
from rq import Queue

from tests.fakes.script_calls import beat, claim, end_leases, sweep
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, enqueue_many, wait_for_result
from worker.claim import Claim
from worker.recovery import give_back
from worker.scripts import Scripts


def test_an_attempt_whose_claim_redis_lost_is_not_counted_twice(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """After a fail-over: else the next one's entries had the ids of what was shown already."""
    [job_id] = enqueue_many(queue, 1)
    lost = lose_claim(redis_client, scripts)
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
    before = everything(redis_client)
    assert give_back(redis_client, scripts, [gone]) == 1
    [lost] = claim(redis_client, scripts, request_id="second")
    roll_back(redis_client, before)
    assert beat(redis_client, scripts, lost) == [b"lost"]
    end_leases(redis_client)
    assert sweep(redis_client, scripts)[0] == [job_id]
    [again] = claim(redis_client, scripts, request_id="third")
    assert (gone.attempt, lost.attempt, again.attempt) == (1, 2, 3)


def test_an_attempt_whose_claim_redis_lost_is_counted_by_the_hand_over_that_its_fenced_append_leads_to(
    redis_client: redis.Redis, scripts: Scripts, queue: Queue
) -> None:
    """Before the next beat, which does not know of it any more."""
    [job_id] = enqueue_many(queue, 1)
    lost = lose_claim(redis_client, scripts)
    assert give_back(redis_client, scripts, [lost]) == 0
    [again] = claim(redis_client, scripts)
    assert (again.job_id, lost.attempt, again.attempt) == (job_id, 1, 2)


def test_a_worker_that_claims_its_own_job_once_more_runs_it_beside_what_its_engine_still_has_to_abort(
    redis_url: str, redis_client: redis.Redis, queue: Queue
) -> None:
    """The two may have the same number, and neither is in the other's way."""
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=9)
    before = everything(redis_client)
    aborted: list[str] = []
    with WorkerThread(redis_url) as worker:
        engine, abort = worker.engine, worker.engine.abort
        engine.abort = lambda request_id: aborted.append(request_id)
        engine.hold_after(5)
        wait_until(lambda: engine.running == [f"{job.id}:1"])
        roll_back(redis_client, before)
        wait_until(lambda: len(engine.running) == 2)
        for request_id in aborted:
            abort(request_id)
        engine.go_on()
        result = wait_for_result(redis_client, job.id)
        assert (result.status, len(result.choices[0].token_ids)) == ("finished", 9)


def lose_claim(redis_client: redis.Redis, scripts: Scripts) -> Claim:
    before = everything(redis_client)
    [lost] = claim(redis_client, scripts)
    roll_back(redis_client, before)
    return lost


def everything(redis_client: redis.Redis) -> dict[bytes, bytes | None]:
    return {name: redis_client.dump(name) for name in redis_client.scan_iter()}


def roll_back(redis_client: redis.Redis, before: dict[bytes, bytes | None]) -> None:
    """As a fail-over to a replica that lacks the last writes."""
    with redis_client.pipeline() as pipe:
        pipe.flushall()
        for name, value in before.items():
            assert value is not None
            pipe.restore(name, 0, value)
        pipe.execute()
