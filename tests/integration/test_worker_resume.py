"""Jobs that go on in mid-generation: what another attempt takes from the stream, and when it starts over instead."""

from collections.abc import Iterator

import pytest
import redis
from rq import Queue

from engine.sampling_params import SamplingParams
from producer.contract import Chunk, Marker, Result, keys
from tests.fakes.fake_engine import FakeEngine, expected_logprob, expected_tokens
from tests.fakes.fake_tokenizer import FakeTokenizer, text_of
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    stored_chunks,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
    wait_until,
)
from worker import intake
from worker.logprobs import LogprobWriter
from worker.scripts import RESUME_FIELD
from worker.translate import default_seed

NUM_TOKENS = 60
PROMPT = [3, 4]


@pytest.fixture
def heir(redis_url: str) -> Iterator[WorkerThread]:
    """A worker that serves once it is entered."""
    yield WorkerThread(redis_url)


def answer(job_id: str, index: int = 0, num_tokens: int = NUM_TOKENS) -> list[int]:
    return expected_tokens(PROMPT, SamplingParams(max_tokens=num_tokens, seed=default_seed(job_id)), index)


def check_whole(client: redis.Redis, result: Result, *, num_choices: int = 1) -> None:
    """The stream, joined, and the result are what one attempt alone would have given."""
    assert result.status == "finished"
    for index in range(num_choices):
        token_ids = answer(result.job_id, index)
        choice = result.choices[index]
        assert (choice.token_ids, choice.text, choice.finish_reason) == (token_ids, text_of(token_ids), "length")
    chunks = stored_chunks(client, result.job_id)
    for choice in result.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert [token_id for chunk in mine for token_id in chunk.token_ids] == choice.token_ids
        assert [chunk.token_offset for chunk in mine] == [
            sum(len(chunk.token_ids) for chunk in mine[:at]) for at in range(len(mine))
        ]
    assert result.usage.completion_tokens == num_choices * NUM_TOKENS
    assert result.usage.prompt_tokens == len(PROMPT)


def check_logprobs(client: redis.Redis, result: Result) -> None:
    """Every token has its own, in the stream and in the result, and the prompt came once, first."""
    writer = LogprobWriter(FakeTokenizer())  # type: ignore[arg-type]
    chunks = stored_chunks(client, result.job_id)
    for holder in (*chunks, *result.choices):
        assert holder.logprobs == [writer.write(expected_logprob(token_id, 2)) for token_id in holder.token_ids]
    assert [chunk.prompt for chunk in chunks if chunk.prompt is not None] == [result.prompt]
    assert chunks[0].prompt is not None and result.prompt is not None
    assert result.prompt.logprobs == [None, writer.write(expected_logprob(PROMPT[1], 2))]
    assert (result.prompt.text, result.prompt.token_ids) == (text_of(PROMPT), PROMPT)


def markers(client: redis.Redis, job_id: str) -> list[Marker]:
    rows = client.xrange(keys.stream_key(job_id))
    return [Marker.model_validate_json(fields[b"m"]) for _, fields in rows if b"m" in fields]


def write_stream(client: redis.Redis, job_id: str, *entries: Chunk, **fields: object) -> None:
    """What an attempt before left behind, and the flag of the sweeper that found it."""
    begun = {"prompt_token_ids": PROMPT, "seed": default_seed(job_id), "fingerprint": "fake"}
    marker = Marker(job_id=job_id, attempt=1, worker="dead", **{**begun, **fields})
    client.xadd(keys.stream_key(job_id), {"m": marker.to_wire()}, id="1-0")
    for seq, entry in enumerate(entries, 1):
        client.xadd(keys.stream_key(job_id), {"d": entry.to_wire()}, id=f"1-{seq}")
    client.hset(f"rq:job:{job_id}", RESUME_FIELD, client.hget(f"rq:job:{job_id}", "enqueued_at"))


def chunk(job_id: str, token_ids: list[int], *, offset: int = 0, **fields: object) -> Chunk:
    given = {"text": text_of(token_ids), **fields}
    return Chunk(job_id=job_id, token_offset=offset, token_ids=token_ids, **given)


def test_a_handed_over_job_goes_on_at_its_next_token(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url, FakeEngine(step_seconds=0.01)):
        job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 3)
    before = redis_client.xrange(keys.stream_key(job.id))
    with WorkerThread(redis_url) as heir:
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
        assert result.attempts == 2 and heir.engine.num_resumed_tokens[f"{job.id}:2"] > 0
        wait_for_no_leftovers(redis_client)
    assert redis_client.xrange(keys.stream_key(job.id))[: len(before)] == before
    assert [marker.reset for marker in markers(redis_client, job.id)] == [False, False]


def test_logprobs_and_the_echoed_prompt_outlive_a_hand_over(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url, FakeEngine(step_seconds=0.01)):
        job = queue.enqueue(
            FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS, logprobs=True, top_logprobs=2, echo=True
        )  # fmt: skip
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 3)
    with WorkerThread(redis_url) as heir:
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
        check_logprobs(redis_client, result)
        assert heir.engine.num_resumed_tokens[f"{job.id}:2"] > 0


def test_jobs_of_a_killed_worker_go_on_from_what_is_stored(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerProcess(redis_url, step_seconds=0.02, lease_seconds=2) as doomed:
        doomed.wait_until_serving()
        ids = enqueue_many(queue, 20, prompt=PROMPT, max_tokens=NUM_TOKENS, n=2)
        wait_until(lambda: all(redis_client.xlen(keys.stream_key(job_id)) > 3 for job_id in ids))
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


def test_a_stored_finish_that_the_replay_does_not_reach_starts_the_job_over(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5], finish_reason="stop"))
    with heir:
        check_started_over(redis_client, job.id, attempts=3)


def test_text_that_its_tokens_do_not_come_to_here_starts_the_job_over(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5], text="something else"))
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


def check_started_over(client: redis.Redis, job_id: str, *, attempts: int) -> None:
    result = wait_for_result(client, job_id)
    assert result.status == "finished" and result.attempts == attempts
    assert result.choices[0].token_ids == answer(job_id) and stream_text(client, job_id) == result.text
    assert [marker.reset for marker in markers(client, job_id)][-1] is True
    wait_for_no_leftovers(client)


def test_a_job_that_rq_puts_back_starts_over(heir: WorkerThread, queue: Queue, redis_client: redis.Redis) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    redis_client.hset(job.key, RESUME_FIELD, "an earlier arrival")
    with heir:
        check_started_over(redis_client, job.id, attempts=2)


def test_a_zombie_that_wrote_after_the_stream_was_read_makes_the_next_attempt_read_again(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Between reading the stream and the marker that fences it out, the attempt before has one more say."""
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    tokens = answer(job.id)
    write_stream(redis_client, job.id, chunk(job.id, tokens[:5]))
    heir = WorkerThread(redis_url)
    real_admit = heir.service._intake.admit

    def admit(claim: object) -> object:
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
    with WorkerThread(redis_url, FakeEngine(step_seconds=0.02)):
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 9)
        rows = redis_client.xrange(keys.stream_key(job.id))
        with redis_client.pipeline() as pipe:
            pipe.delete(keys.stream_key(job.id))
            for entry_id, fields in rows[:3]:
                pipe.xadd(keys.stream_key(job.id), fields, id=entry_id)
            pipe.execute()
        result = wait_for_result(redis_client, job.id)
        check_whole(redis_client, result)
    assert result.attempts == 2


def test_a_cancel_before_the_first_new_token_keeps_what_was_stored(
    heir: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt=PROMPT, max_tokens=NUM_TOKENS)
    write_stream(redis_client, job.id, chunk(job.id, answer(job.id)[:5]))
    heir.engine.pause()
    with heir:
        wait_until(lambda: heir.engine.running)
        job.cancel()
        result = wait_for_result(redis_client, job.id)
    assert result.status == "cancelled" and result.choices[0].token_ids == answer(job.id)[:5]
    assert stream_text(redis_client, job.id) == result.text and result.usage.completion_tokens == 5
