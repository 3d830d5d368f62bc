"""Jobs that kill their workers: what is counted, who runs alone, who fails and who does not."""

from collections.abc import Sequence
from typing import Any

import pytest
import redis
from rq import Queue, Retry

from producer.contract import Chunk, ErrorCode, Marker, keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.fake_tokenizer import POISON_TOKEN
from tests.fakes.redis_reads import sorted_set_names
from tests.fakes.script_calls import beat
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.claim import MAX_ALL_CRASHES, MAX_CRASHES, SUSPECT_CRASHES, Claim
from worker.recovery import give_back
from worker.scripts import BLAMED_FIELD, CRASHES_FIELD, RESUME_FIELD, Scripts

QUEUE = keys.DEFAULT_QUEUE
SCRIPTS = Scripts()


def claim(client: redis.Redis, number: int) -> list[Claim]:
    arguments: dict[str, Any] = {"worker": f"w{number}", "queues": [QUEUE], "lease_seconds": 30.0, "max_jobs": 100}
    reply = SCRIPTS.claim(client, request_id=f"claim-{number}", **arguments)
    assert reply is not None
    return [Claim.parse(entry, 0.0) for entry in reply[0]]


def mark(client: redis.Redis, held: Claim, *, tokens: Sequence[int] = ()) -> None:
    """What an attempt at the job has written."""
    marker = Marker(job_id=held.job_id, attempt=held.attempt, worker="w")
    client.xadd(keys.stream_key(held.job_id), {"m": marker.to_wire()}, id=f"{held.attempt}-0")
    for seq, token_id in enumerate(tokens, 1):
        chunk = Chunk(job_id=held.job_id, token_ids=[token_id])
        client.xadd(keys.stream_key(held.job_id), {"d": chunk.to_wire()}, id=f"{held.attempt}-{seq}")


def crash(client: redis.Redis) -> None:
    """Every lease ends, and a sweeper finds them."""
    for job_id in sorted_set_names(client, keys.leases_key(QUEUE)):
        client.zadd(keys.leases_key(QUEUE), {job_id: 1})
    SCRIPTS.sweep(client, queue=QUEUE, lease_seconds=30.0, max_jobs=100, execution_id="sweep")


def test_a_crash_counts_only_after_the_marker_and_in_a_row_only_without_a_token(
    redis_client: redis.Redis, queue: Queue
) -> None:
    (job_id,) = enqueue_many(queue, 1)
    counts = []
    for number, begins, tokens in ((1, False, []), (2, True, []), (3, True, []), (4, True, [5]), (5, True, [])):
        (held,) = claim(redis_client, number)
        if begins:
            mark(redis_client, held, tokens=tokens)
        crash(redis_client)
        counts.append(redis_client.hget(f"rq:job:{job_id}", CRASHES_FIELD))
    assert counts == [None, b"1:1", b"2:2", b"0:3", b"1:4"]


def test_a_hand_over_is_no_crash_and_new_tokens_clear_a_suspect(redis_client: redis.Redis, queue: Queue) -> None:
    (job_id,) = enqueue_many(queue, 1)
    for number in (1, 2):
        (held,) = claim(redis_client, number)
        mark(redis_client, held)
        crash(redis_client)
    (held,) = claim(redis_client, 3)
    assert held.is_suspect
    mark(redis_client, held)
    give_back(redis_client, SCRIPTS, [held])
    (held,) = claim(redis_client, 4)
    assert held.is_suspect and held.num_crashes == SUSPECT_CRASHES
    mark(redis_client, held, tokens=[5])
    give_back(redis_client, SCRIPTS, [held])
    (held,) = claim(redis_client, 5)
    assert not held.is_suspect and held.num_all_crashes == 2
    assert redis_client.hget(f"rq:job:{job_id}", CRASHES_FIELD) == b"0:2"


def test_a_crash_that_was_none_is_taken_back_once_and_not_from_what_a_token_has_cleared(
    redis_client: redis.Redis, queue: Queue
) -> None:
    (job_id,) = enqueue_many(queue, 1)
    attempts: list[Claim] = []

    def run(*, tokens: Sequence[int] = ()) -> object:
        (held,) = claim(redis_client, len(attempts))
        attempts.append(held)
        mark(redis_client, held, tokens=tokens)
        crash(redis_client)
        return redis_client.hget(f"rq:job:{job_id}", CRASHES_FIELD)

    def lost(held: Claim, *, was_away: bool = True) -> object:
        assert beat(redis_client, SCRIPTS, held, was_away=was_away) == [b"lost"]
        return redis_client.hget(f"rq:job:{job_id}", CRASHES_FIELD)

    assert [run(), run()] == [b"1:1", b"2:2"]
    assert lost(attempts[0], was_away=False) == b"2:2", "its worker hung"
    assert [lost(attempts[0]), lost(attempts[0])] == [b"1:2", b"1:2"]
    assert run(tokens=[5]) == b"0:3"
    assert lost(attempts[1]) == b"0:3"


def test_a_job_that_starts_over_starts_without_its_crashes(redis_client: redis.Redis, queue: Queue) -> None:
    (job_id,) = enqueue_many(queue, 1)
    (held,) = claim(redis_client, 1)
    mark(redis_client, held)
    crash(redis_client)
    redis_client.hset(f"rq:job:{job_id}", "enqueued_at", "2026-11-23T15:00:00.000000Z")  # as RQ's requeue does
    (held,) = claim(redis_client, 2)
    assert held.num_all_crashes == 0
    assert redis_client.hmget(f"rq:job:{job_id}", CRASHES_FIELD, BLAMED_FIELD) == [None, None]


def come_back(client: redis.Redis, job_id: str, crashes: str) -> None:
    """The job lies in its queue as a sweeper left it."""
    enqueued_at = client.hget(f"rq:job:{job_id}", "enqueued_at")
    assert enqueued_at is not None
    client.hset(f"rq:job:{job_id}", mapping={RESUME_FIELD: enqueued_at, CRASHES_FIELD: crashes})


@pytest.mark.parametrize("crashes", [f"{MAX_CRASHES}:{MAX_CRASHES}", f"0:{MAX_ALL_CRASHES}"])
def test_poison_fails_with_that_reason_and_its_partial_output_and_is_not_retried(
    crashes: str, redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, retry=Retry(max=3), metadata={"row": 1})
    marker = Marker(job_id=job.id, attempt=1, worker="w", prompt_token_ids=[1], seed=1)
    redis_client.xadd(keys.stream_key(job.id), {"m": marker.to_wire()}, id="1-0")
    chunk = Chunk(job_id=job.id, token_ids=[5], text="partial")
    redis_client.xadd(keys.stream_key(job.id), {"d": chunk.to_wire()}, id="1-1")
    come_back(redis_client, job.id, crashes)
    with WorkerThread(redis_url) as worker:
        result = wait_for_result(redis_client, job.id)
        wait_for_no_leftovers(redis_client)
    assert result.status == "failed" and result.error is not None and result.error.code is ErrorCode.POISON
    assert result.text == "partial" == stream_text(redis_client, job.id) and result.metadata == {"row": 1}
    assert result.choices[0].finish_reason == "error"
    assert worker.engine.submitted == [] and queue.failed_job_registry.get_job_ids() == [job.id]


def test_an_innocent_suspect_that_puts_out_a_token_frees_the_way(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 4, max_tokens=40)
    for job_id in ids[:2]:
        come_back(redis_client, job_id, "2:2")
    engine = FakeEngine(step_seconds=0.02)
    engine.pause()
    with WorkerThread(redis_url, engine):
        wait_until(lambda: engine.running)
        wait_until(lambda: queue.count == 0)
        assert engine.running == [f"{ids[0]}:1"]  # alone, although all four are held
        engine.go_on()
        for job_id in ids:
            assert wait_for_result(redis_client, job_id).status == "finished"
        assert engine.submitted == [f"{job_id}:1" for job_id in ids]
        wait_for_no_leftovers(redis_client)


def test_a_job_that_kills_three_workers_fails_and_its_batch_mates_finish(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """It kills them in the first step that it is part of, the batch-mates' first step, too."""
    ids = [queue.enqueue(FUNCTION, prompt=[POISON_TOKEN if at == 2 else at], max_tokens=5).id for at in range(5)]
    num_deaths = 0
    while not all(redis_client.exists(keys.result_key(job_id)) for job_id in ids):
        with WorkerProcess(redis_url, lease_seconds=2, step_seconds=0.02) as worker:
            wait_until(
                lambda: (
                    worker.process.poll() is not None
                    or all(redis_client.exists(keys.result_key(job_id)) for job_id in ids)
                )
            )
            num_deaths += worker.process.poll() is not None
    results = [wait_for_result(redis_client, job_id) for job_id in ids]
    assert [result.status for result in results] == ["finished"] * 2 + ["failed"] + ["finished"] * 2
    assert results[2].error is not None and results[2].error.code is ErrorCode.POISON
    assert num_deaths == MAX_CRASHES
