"""Jobs whose stored stream another attempt cannot go on from: it starts over, and says so with `reset`."""

from typing import Any

import pytest
import redis
from rq import Queue

from producer.contract import keys
from tests.fakes.resumed_streams import NUM_TOKENS, PROMPT, answer, chunk, markers, write_stream
from tests.fakes.worker_runs import FUNCTION, WorkerThread, stream_text, wait_for_no_leftovers, wait_for_result
from worker.scripts import RESUME_FIELD


@pytest.mark.parametrize("fields", [{"finish_reason": "stop"}, {"text": "something else"}], ids=["finish", "text"])
def test_what_the_replay_of_its_tokens_does_not_come_to_starts_the_job_over(
    fields: dict[str, Any], heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5], **fields))
    with heir:
        check_started_over(redis_client, job.id, attempts=3)
        assert heir.engine.submitted == [f"{job.id}:2", f"{job.id}:3"]


@pytest.mark.parametrize(
    "fields",
    [{"fingerprint": "another machine"}, {"seed": None}, {"prompt_token_ids": None}],
    ids=lambda f: next(iter(f)),
)
def test_a_first_marker_that_does_not_fit_starts_the_job_over(
    fields: dict[str, object], heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]), **fields)
    with heir:
        check_started_over(redis_client, job.id, attempts=2)


def test_a_stream_with_a_gap_starts_the_job_over(heir: WorkerThread, queue: Queue, redis_client: redis.Redis) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(
        redis_client, job.id, *[chunk(job.id, [token_id], offset=at) for at, token_id in enumerate(answer(job.id)[:5])]
    )
    redis_client.xdel(keys.stream_key(job.id), "1-2")
    with heir:
        check_started_over(redis_client, job.id, attempts=2)


def test_a_job_that_rq_puts_back_starts_over(heir: WorkerThread, queue: Queue, redis_client: redis.Redis) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    redis_client.hset(job.key, RESUME_FIELD, "an earlier arrival")
    with heir:
        check_started_over(redis_client, job.id, attempts=2)


def check_started_over(client: redis.Redis, job_id: str, *, attempts: int) -> None:
    result = wait_for_result(client, job_id)
    assert result.status == "finished" and result.attempts == attempts
    assert result.choices[0].token_ids == answer(job_id) and stream_text(client, job_id) == result.text
    assert [marker.reset for marker in markers(client, job_id)][-1] is True
    wait_for_no_leftovers(client)
