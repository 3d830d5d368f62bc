"""Jobs that go on in mid-generation: what another attempt takes from the stream, and when it starts over instead."""

import pytest
import redis
from rq import Queue

from producer import Client
from producer.contract import keys
from tests.fakes.redis_reads import stream_rows
from tests.fakes.resumed_streams import (
    NUM_TOKENS,
    PROMPT,
    answer,
    check_logprobs,
    check_whole,
    chunk,
    markers,
    write_stream,
)
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    stored_chunks,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker import intake
from worker.claim import Claim
from worker.running_job import RunningJob


def test_a_handed_over_job_goes_on_at_its_next_token(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url) as first:
        first.engine.hold_after(5)
        job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
        wait_for_entries(redis_client, [job.id], 2)
    before = stream_rows(redis_client, keys.stream_key(job.id))
    with WorkerThread(redis_url) as heir:
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
        assert result.attempts == 2 and heir.engine.num_resumed_tokens[f"{job.id}:2"] > 0
        wait_for_no_leftovers(redis_client)
    assert stream_rows(redis_client, keys.stream_key(job.id))[: len(before)] == before
    assert [marker.reset for marker in markers(redis_client, job.id)] == [False, False]


def test_logprobs_and_the_echoed_prompt_outlive_a_hand_over(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as first:
        first.engine.hold_after(5)
        job = queue.enqueue(
            FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS, logprobs=True, top_logprobs=2, echo=True
        )  # fmt: skip
        wait_for_entries(redis_client, [job.id], 2)
    with WorkerThread(redis_url) as heir:
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
        check_logprobs(redis_client, result)
        assert heir.engine.num_resumed_tokens[f"{job.id}:2"] > 0


def test_jobs_of_a_killed_worker_go_on_from_what_is_stored(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerProcess(redis_url, hold_after=5, lease_seconds=2) as doomed:
        doomed.wait_until_serving()
        ids = enqueue_many(queue, 20, prompt=PROMPT, max_tokens=NUM_TOKENS, n=2)
        wait_for_entries(redis_client, ids, 3)
        doomed.process.kill()
        doomed.wait()
    with WorkerThread(redis_url, lease_seconds=2) as heir:
        for job_id in ids:
            check_whole(redis_client, wait_for_result(redis_client, job_id), num_choices=2)
            assert heir.engine.num_resumed_tokens[f"{job_id}:2"] > 0
        wait_for_no_leftovers(redis_client)


def test_jobs_that_come_back_together_do_not_wait_for_a_round_trip_each(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS) for _ in range(100)]
    for job in jobs:
        write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    read: list[str] = []
    monkeypatch.setattr(intake, "read_stored", lambda client, job_id: read.append(job_id))
    with heir:
        for job in jobs:
            check_whole(redis_client, wait_for_result(redis_client, job.id))
    assert read == [] and set(heir.engine.num_resumed_tokens.values()) == {5}


def test_choices_that_had_ended_stay_ended_and_the_others_go_on(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS, n=3)
    write_stream(
        redis_client,
        job.id,
        chunk(job.id, answer(job.id, 1), index=1, finish_reason="length"),
        chunk(job.id, answer(job.id, 0)[:5]),
    )
    with heir:
        check_whole(redis_client, wait_for_result(redis_client, job.id), num_choices=3)
    ends = [chunk.index for chunk in stored_chunks(redis_client, job.id) if chunk.finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_a_job_whose_choices_had_all_ended_is_only_ended(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id), finish_reason="length"))
    with heir:
        check_whole(redis_client, wait_for_result(redis_client, job.id))
    assert redis_client.xlen(keys.stream_key(job.id)) == 4  # its marker, the output, our marker, the end


def test_prompt_and_seed_of_the_first_attempt_count_whatever_the_job_comes_to_today(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="another text with more tokens", max_tokens=NUM_TOKENS, seed=123)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    with heir:
        check_whole(redis_client, wait_for_result(redis_client, job.id))


def test_a_zombie_that_wrote_after_the_stream_was_read_makes_the_next_attempt_read_again(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Between reading the stream and the marker that fences it out, the attempt before has one more say."""
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    tokens = answer(job.id)
    write_stream(redis_client, job.id, chunk(job.id, tokens[:5]))
    heir = WorkerThread(redis_url)
    real_admit = heir.service._intake.admit

    def admit(claim: Claim) -> RunningJob:
        admitted = real_admit(claim)
        heir.service._intake.admit = real_admit
        late = chunk(job.id, tokens[5:6], offset=5)
        redis_client.xadd(keys.stream_key(job.id), {"d": late.to_wire()}, id="1-2")
        return admitted

    heir.service._intake.admit = admit
    with heir:
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
    assert result.attempts == 3
    assert [marker.reset for marker in markers(redis_client, job.id)] == [False, False]


def test_entries_of_the_attempt_before_are_written_again_if_redis_loses_them(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """A fail-over to a replica that was behind: what was read, and what was appended since, are gone."""
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    tokens = answer(job.id)
    write_stream(
        redis_client, job.id, *[chunk(job.id, [token_id], offset=at) for at, token_id in enumerate(tokens[:5])]
    )
    with WorkerThread(redis_url) as heir:
        heir.engine.hold_after(20)
        wait_for_entries(redis_client, [job.id], 8)  # those of before, its own marker, and some output
        rows = stream_rows(redis_client, keys.stream_key(job.id))
        with redis_client.pipeline() as pipe:
            pipe.delete(keys.stream_key(job.id))
            for entry_id, fields in rows[:3]:
                pipe.xadd(keys.stream_key(job.id), dict(fields.items()), id=entry_id)
            pipe.execute()
        heir.engine.go_on()
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
    assert result.attempts == 2


@pytest.mark.parametrize("is_clients", [True, False], ids=["by a client", "by RQ"])
def test_a_cancel_before_the_first_new_token_keeps_what_was_stored(
    heir: WorkerThread,
    queue: Queue,
    redis_client: redis.Redis,
    client: Client,
    caplog: pytest.LogCaptureFixture,
    is_clients: bool,
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    heir.engine.pause()
    with heir:
        wait_until(lambda: heir.engine.running)
        if is_clients:
            assert client.cancel(job.id)
        else:
            job.cancel()
        result = wait_for_result(redis_client, job.id)
    assert result.status == "cancelled" and result.choices[0].token_ids == answer(job.id)[:5]
    assert stream_text(redis_client, job.id) == result.text and result.usage.completion_tokens == 5
    assert "output_failed" not in caplog.text
