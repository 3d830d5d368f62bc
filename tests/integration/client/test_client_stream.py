"""Following a job's stream on a real Redis: late joins, lost messages, resets, ends that publish nothing."""

import threading

import pytest
import redis
from rq.job import Job as RqJob
from rq.job import JobStatus as RqStatus
from rq.serializers import JSONSerializer

from producer import Chunk, Client, InvalidJobError, JobFailedError, JobNotFoundError, ResultTimeoutError
from producer.contract import ErrorCode, ErrorInfo, keys
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.held_job import HeldJob


def texts(chunks: list[Chunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def test_chunks_come_live_in_order_and_join_to_the_result(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("one ")
    stream = job.stream()
    chunks = [next(stream)]
    for word in ("two ", "three "):
        held.write(word)
        chunks.append(next(stream))
    held.write("four", finish_reason="stop")
    result = held.end()
    chunks += list(stream)
    assert texts(chunks) == ["one ", "two ", "three ", "four"]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == result.choices[0].token_ids


def test_a_subscription_that_begins_before_the_job_runs_sees_all_of_it(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a b c")
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(texts(list(job.stream(timeout=30)))))
    reader.start()
    held = worker.claim().begin()
    for word in "abc":
        held.write(word)
    held.end()
    reader.join(30)
    assert seen == ["a", "b", "c"]


def test_an_ended_stream_can_be_read_again_and_from_a_cursor(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    for word in ("one ", "two ", "three"):
        held.write(word)
    held.end()
    stream = job.stream()
    assert next(stream).text == "one "
    cursor = stream.last_id
    stream.close()
    assert texts(list(job.stream())) == ["one ", "two ", "three"]
    assert texts(list(job.stream(after=cursor))) == ["two ", "three"]
    for nonsense in ("soon", "1--5", f"1-{2**64}"):
        with pytest.raises(InvalidJobError, match="after: must be the last_id"):
            job.stream(after=nonsense)


def test_lost_and_repeated_messages_are_made_good(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    stream = job.stream()
    held.write("one ")
    assert next(stream).text == "one "
    held.republish()
    held.write("two ", publish=False)
    held.write("three ")
    held.republish()
    held.connection.publish(keys.stream_key(job.id), "no entry at all")
    held.end()
    assert texts(list(stream)) == ["two ", "three "]


def test_a_job_that_publishes_nothing_is_streamed_all_the_same(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a", stream=False)
    held = worker.claim().begin()
    stream = job.stream()
    held.write("one ", publish=False)
    assert next(stream).text == "one "
    held.write("two", publish=False)
    held.end(publish=False)
    assert texts(list(stream)) == ["two"]


def test_a_reset_takes_back_what_was_shown(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    first = worker.claim().begin()
    stream = job.stream()
    first.write("wrong")
    assert next(stream).text == "wrong"
    first.hand_over()
    second = worker.claim().begin(reset=True)
    second.write("right")
    second.end()
    again = list(stream)
    assert [(chunk.reset, chunk.text) for chunk in again] == [(True, ""), (False, "right")]
    assert texts(list(job.stream())) == ["right"]  # nobody who joins late sees what is void


def test_a_resume_goes_on_where_the_attempt_before_it_ended(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    first = worker.claim().begin()
    stream = job.stream()
    first.write("one ")
    assert next(stream).text == "one "
    first.hand_over()
    second = worker.claim().begin()
    second.write("two")
    second.end()
    assert [(chunk.reset, chunk.text) for chunk in stream] == [(False, "two")]


def test_choices_come_interleaved(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a", n=2)
    held = worker.claim().begin()
    for index in (0, 1, 1, 0):
        held.write(f"{index} ", index=index)
    held.end()
    assert [(chunk.index, chunk.token_offset) for chunk in job.stream()] == [(0, 0), (1, 0), (1, 2), (0, 2)]


def test_a_failed_job_raises_behind_its_last_chunk(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("half", finish_reason="error")
    held.end("failed", error=ErrorInfo(code=ErrorCode.POISON, message="it kills its worker"))
    stream = job.stream()
    assert next(stream).text == "half"
    with pytest.raises(JobFailedError, match="it kills its worker") as error:
        next(stream)
    assert error.value.error.code is ErrorCode.POISON


def test_behind_the_streams_time_the_result_is_streamed(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a", n=2)
    held = worker.claim().begin()
    stream = job.stream()
    held.write("one ")
    assert next(stream).text == "one "
    held.write("two", publish=False, finish_reason="stop")
    held.write("other", index=1, publish=False, finish_reason="length")
    held.end(publish=False)
    held.expire_stream()
    rest = list(stream)
    assert [(chunk.index, chunk.text, chunk.token_offset, chunk.finish_reason) for chunk in rest] == [
        (0, "two", 4, "stop"),
        (1, "other", 0, "length"),
    ]
    assert texts(list(job.stream())) == ["one two", "other"]
    # What a cursor stands for is not known any more: the reader is told to start over.
    assert [(chunk.reset, chunk.text) for chunk in job.stream(after="1-1")] == [
        (True, ""),
        (False, "one two"),
        (False, "other"),
    ]


def test_a_long_stream_is_read_in_pages(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    for number in range(2100):
        held.write(f"{number} ", publish=False)
    held.end(publish=False)
    assert "".join(texts(list(job.stream()))) == "".join(f"{number} " for number in range(2100))


def test_an_unknown_job_and_a_deleted_one_are_not_waited_for(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    with pytest.raises(JobNotFoundError, match="there is no job nobody"):
        next(client.job("nobody").stream())
    job = client.submit("a")
    held = worker.claim().begin()
    stream = job.stream()
    held.write("one ")
    assert next(stream).text == "one "
    RqJob.fetch(job.id, connection=redis_client, serializer=JSONSerializer).delete()
    with pytest.raises(JobNotFoundError):
        next(stream)


def test_a_job_that_rq_failed_raises_with_rqs_reason(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    found = RqJob.fetch(job.id, connection=redis_client, serializer=JSONSerializer)
    redis_client.lpop("rq:queue:promptmill")
    with redis_client.pipeline() as pipeline:
        found.set_status(RqStatus.FAILED, pipeline=pipeline)
        found._handle_failure("Traceback:\nrq.exceptions.AbandonedJobError: moved to failed", pipeline=pipeline)
        pipeline.execute()
    with pytest.raises(JobFailedError, match="AbandonedJobError: moved to failed"):
        list(job.stream(timeout=30))


def test_silence_raises_behind_the_timeout_and_the_job_goes_on(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    with pytest.raises(ResultTimeoutError, match=r"no chunk within 0\.1 s"):
        next(job.stream(timeout=0.1))
    held = worker.claim().begin()
    held.write("one")
    held.end()
    assert texts(list(job.stream(timeout=10))) == ["one"]


def test_a_requeued_job_is_waited_for_not_its_old_end(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("old")
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="bad luck"))
    worker.enqueue_again(job.id)
    seen: list[Chunk] = []
    reader = threading.Thread(target=lambda: seen.extend(job.stream(timeout=30)))
    claimed = worker.claim()  # the moment between a claim and its marker
    reader.start()
    again = claimed.begin(reset=True)
    again.write("new")
    again.end()
    reader.join(30)
    assert seen[-1].text == "new"


def test_a_cut_connection_loses_and_repeats_nothing(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    stream = job.stream()
    seen: list[str] = []
    for number in range(20):
        held.write(f"{number} ")
        seen.append(next(stream).text)
        if number % 3 == 0:
            cut_subscribers(redis_client)
        held.write(f"{number}b ")
        seen.append(next(stream).text)
    held.end()
    seen += texts(list(stream))
    assert seen == [word for number in range(20) for word in (f"{number} ", f"{number}b ")]


def cut_subscribers(connection: redis.Redis) -> None:
    """What Redis does to a slow subscriber, or a network to any."""
    connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


def test_many_subscribers_each_see_each_token_once(client: Client, worker: FakeWorker) -> None:
    num_tokens, num_jobs = 60, 8
    ready = threading.Barrier(num_jobs * 2 + 1, timeout=30)

    def behave(held: HeldJob) -> None:
        held.begin()
        for number in range(num_tokens):
            held.write(f"{held.job_id}-{number} ", publish=number % 7 != 0)
        held.end()

    seen: dict[tuple[str, int], list[str]] = {}

    def read(job_id: str, reader: int) -> None:
        ready.wait()
        seen[job_id, reader] = texts(list(client.job(job_id).stream(timeout=60)))

    jobs = client.submit_many([{"prompt": "a"} for _ in range(num_jobs)])
    threads = [threading.Thread(target=read, args=(job.id, reader)) for job in jobs for reader in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    with worker.serving(behave):
        for thread in threads:
            thread.join(60)
    for job in jobs:
        for reader in range(2):
            assert seen[job.id, reader] == [f"{job.id}-{number} " for number in range(num_tokens)]
