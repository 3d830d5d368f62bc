"""Jobs through a worker on a real Redis, with a fake engine."""

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import redis
from redis.typing import FieldT
from rq import Queue
from rq.job import Job, JobStatus

import worker.job_loop
from producer import Client, JobFailedError
from producer.contract import ErrorCode, JobRequest, keys
from producer.enqueue import encode_call
from tests.fakes.redis_reads import stream_rows
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    rq_queue,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)


def test_a_job_enqueued_by_plain_rq_runs(worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis) -> None:
    job = queue.enqueue(FUNCTION, prompt="Name three rivers", max_tokens=5, metadata={"row": 7})
    result = wait_for_result(redis_client, job.id)
    assert result.status == "finished" and result.metadata == {"row": 7} and result.attempts == 1
    assert len(result.choices[0].token_ids) == 5 and result.usage.prompt_tokens == 3
    assert stream_text(redis_client, job.id) == result.text
    assert job.get_status() is JobStatus.FINISHED
    assert job.return_value()["choices"][0]["text"] == result.text
    assert result.timings.total is not None and result.timings.queued is not None
    wait_for_no_leftovers(redis_client)
    assert queue.finished_job_registry.get_job_ids() == [job.id]
    for key in (keys.result_key(job.id), keys.stream_key(job.id), f"rq:job:{job.id}", f"rq:results:{job.id}"):
        assert redis_client.ttl(key) > 0, key


def test_a_worker_takes_requests_of_the_size_that_it_publishes(
    worker_thread: WorkerThread, redis_client: redis.Redis, client: Client
) -> None:
    [worker] = wait_until(client.workers)
    most = worker.max_request_bytes
    assert most is not None
    spare = most - len(encode_call(JobRequest(prompt="x", max_tokens=1))) + 1
    fits, too_large = (client.submit("x" * (spare + more), max_tokens=1) for more in (0, 1))
    assert wait_for_result(redis_client, fits.id).status == "finished"
    error = wait_for_result(redis_client, too_large.id).error
    assert error is not None and error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert f"has {most + 1} bytes" in error.message or f"more than {most}" in error.message


def test_a_job_written_by_redis_commands_runs(worker_thread: WorkerThread, redis_client: redis.Redis) -> None:
    data = json.dumps([FUNCTION, None, [], {"prompt": "Hello", "max_tokens": 3}])
    with redis_client.pipeline() as pipe:
        pipe.hset(
            "rq:job:raw-1",
            mapping={
                "data": data,
                "created_at": "2026-11-23T15:00:00.000000Z",
                "origin": "promptmill",
                "status": "queued",
                "timeout": 180,
            },
        )
        pipe.sadd("rq:queues", "rq:queue:promptmill")
        pipe.rpush("rq:queue:promptmill", "raw-1")
        pipe.execute()
    assert len(wait_for_result(redis_client, "raw-1").choices[0].token_ids) == 3
    wait_for_no_leftovers(redis_client)


def test_several_choices_are_streamed_and_kept(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4, n=3)
    result = wait_for_result(redis_client, job.id)
    assert [choice.index for choice in result.choices] == [0, 1, 2]
    assert result.usage.completion_tokens == 12


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


BAD_CALLS: dict[str, tuple[Callable[[Queue], Job], str]] = {
    "wrong label": (lambda queue: queue.enqueue("os.system", "true"), "os.system"),
    "positional": (lambda queue: queue.enqueue(FUNCTION, "Hello"), "positional"),
    "unknown field": (lambda queue: queue.enqueue(FUNCTION, prompt="Hello", max_token=5), "max_token"),
    "no prompt": (lambda queue: queue.enqueue(FUNCTION, max_tokens=5), "prompt"),
    "other model": (lambda queue: queue.enqueue(FUNCTION, prompt="Hello", model="other"), "other"),
    "too long": (lambda queue: queue.enqueue(FUNCTION, prompt="word " * 5000), "4096"),
    "surrogate": (lambda queue: queue.enqueue(FUNCTION, prompt="Hello", metadata={"a": "\ud800"}), "metadata"),
    "surrogate field": (
        lambda queue: queue.enqueue(FUNCTION, prompt="Hello", description="x", **{"a\ud800": 1}),
        "surrogates",
    ),
    "deep metadata": (lambda queue: queue.enqueue(FUNCTION, prompt="Hello", metadata=nested(900)), "metadata"),
    "pickled": (lambda queue: Queue(queue.name, connection=queue.connection).enqueue(FUNCTION, prompt="Hello"), "JSON"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_job_fails_with_a_reason_and_the_next_one_runs(
    name: str, worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    enqueue, reason = BAD_CALLS[name]
    bad = enqueue(queue)
    good = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    assert wait_for_result(redis_client, good.id).status == "finished"
    result = wait_for_result(redis_client, bad.id)
    assert result.status == "failed" and result.error is not None and reason in result.error.message
    assert stream_text(redis_client, bad.id) == ""
    wait_for_no_leftovers(redis_client)
    assert Job.fetch(bad.id, connection=redis_client, serializer=queue.serializer).get_status() is JobStatus.FAILED
    latest = bad.latest_result() if name != "pickled" else None
    assert latest is None or reason in str(latest.exc_string)
    assert redis_client.ttl(f"rq:results:{bad.id}") > 0  # RQ alone would keep it for ever


@pytest.mark.parametrize(
    "fields",
    [
        {"data": "not json"},
        {"data": "[1, 2]"},
        {"data": '{"a": 1}'},
        {"data": "[" * 100_000},
        {"status": "queued"},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "timeout": "soon"},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "created_at": "yesterday"},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "timeout": "9" * 400},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "result_ttl": "9" * 30},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "failure_ttl": "9" * 30},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "retries_left": "2", "retry_intervals": "[]"},
        {"data": json.dumps([FUNCTION, None, [], {"prompt": "x"}]), "repeats_left": "2", "repeat_intervals": '["x"]'},
        {"data": json.dumps([FUNCTION, None, [], ["prompt"]])},
        {"data": b"\xff\xfe"},
    ],
)
def test_a_malformed_record_fails_alone(
    fields: dict[FieldT, Any], worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    redis_client.hset("rq:job:broken", mapping={"status": "queued", "origin": "promptmill", **fields})
    redis_client.rpush(queue.key, "broken")
    good = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    assert wait_for_result(redis_client, good.id).status == "finished"
    result = wait_for_result(redis_client, "broken")
    assert result.error is not None and result.error.code is ErrorCode.INVALID_REQUEST
    wait_until(lambda: redis_client.hget("rq:job:broken", "status") == b"failed")
    wait_for_no_leftovers(redis_client)


def test_ids_that_name_no_job_are_dropped_and_malformed_ones_say_why(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, redis_url: str
) -> None:
    for name in ("text", "bad text"):
        redis_client.set(f"rq:job:{name}", "no hash")
    call = json.dumps([FUNCTION, None, [], {"prompt": "x"}])
    redis_client.hset("rq:job:order:42", mapping={"status": "queued", "origin": queue.name, "data": call})
    redis_client.rpush(queue.key, "gone", "text", "bad text", "bad id!", "rq:job:x", "a" * 257, "order:42")
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    assert wait_for_result(redis_client, job.id).status == "finished"
    assert queue.count == 0 and not redis_client.exists("rq:job:bad id!")
    wait_for_no_leftovers(redis_client)
    with Client(redis_url) as client, pytest.raises(JobFailedError, match="a job id consists of letters"):
        client.result("order:42", timeout=30)


def test_an_id_has_256_characters_at_most(worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis) -> None:
    longest, longer = "a" * 256, "a" * 257
    call = json.dumps([FUNCTION, None, [], {"prompt": "x", "max_tokens": 2}])
    for job_id in (longer, longest):
        redis_client.hset(f"rq:job:{job_id}", mapping={"status": "queued", "origin": queue.name, "data": call})
        redis_client.rpush(queue.key, job_id)
    assert wait_for_result(redis_client, longest).status == "finished"
    wait_until(lambda: redis_client.hget(f"rq:job:{longer}", "status") == b"failed")
    assert redis_client.ttl(f"rq:job:{longer}") > 0


def test_jobs_finish_out_of_order(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url) as worker:
        worker.engine.hold_after(1)
        long = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
        short = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2) for _ in range(20)]
        wait_until(lambda: len(worker.engine.running) == 21)
        assert {job.get_status() for job in [long, *short]} == {JobStatus.STARTED}
        worker.engine.hold_after(2)
        for job in short:
            wait_for_result(redis_client, job.id)
        assert long.get_status() is JobStatus.STARTED
        assert redis_client.exists(keys.result_key(long.id)) == 0


def test_an_engine_error_fails_the_job_with_its_partial_output(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.hold_after(3)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
    wait_for_entries(redis_client, [job.id], 2)
    worker_thread.engine.fail(job.id)
    result = wait_for_result(redis_client, job.id)
    assert result.status == "failed" and result.choices[0].finish_reason == "error"
    assert result.text and stream_text(redis_client, job.id) == result.text
    wait_until(lambda: job.get_status() is JobStatus.FAILED)
    assert "out of luck" in str(job.latest_result().exc_string)
    wait_for_no_leftovers(redis_client)


def test_a_job_past_its_rq_timeout_fails_with_its_partial_output(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_thread.engine.hold_after(3)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000, job_timeout=3600)
    wait_for_entries(redis_client, [job.id], 2)
    an_hour_later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr(worker.job_loop, "time", an_hour_later)
    result = wait_for_result(redis_client, job.id)
    assert result.error is not None and result.error.code is ErrorCode.TIMEOUT
    assert result.text and result.choices[0].finish_reason == "error"
    wait_until(lambda: job.get_status() is JobStatus.FAILED)


def test_a_result_ttl_of_zero_leaves_no_rq_job(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, result_ttl=0)
    assert wait_for_result(redis_client, job.id).status == "finished"
    wait_until(lambda: not redis_client.exists(job.key))
    wait_for_no_leftovers(redis_client)


def test_a_job_enqueued_again_while_it_runs_runs_once(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    worker_thread.engine.pause()
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, job_id="twice")
    wait_until(lambda: worker_thread.engine.running)
    queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, job_id="twice")
    wait_until(lambda: queue.count == 0)
    wait_until(lambda: job.get_status() is JobStatus.STARTED)
    worker_thread.engine.go_on()
    assert wait_for_result(redis_client, job.id).attempts == 1
    wait_until(lambda: job.get_status() is JobStatus.FINISHED)
    assert worker_thread.engine.submitted == ["twice:1"]
    wait_for_no_leftovers(redis_client)


def test_the_results_line_tells_of_every_job_that_ends(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    good = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    bad = queue.enqueue(FUNCTION, prompt="")
    wait_for_result(redis_client, good.id)
    wait_for_result(redis_client, bad.id)
    lines = [json.loads(fields[b"d"]) for _, fields in stream_rows(redis_client, keys.results_channel(queue.name))]
    assert {line["job_id"]: line["status"] for line in lines} == {good.id: "finished", bad.id: "failed"}
    assert all(not line["choices"] for line in lines)


def test_results_in_s3_leave_only_their_place_in_redis(
    redis_url: str, s3_endpoint: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url, results="s3://results/unit", s3_endpoint_url=s3_endpoint):
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=3)
        result = wait_for_result(redis_client, job.id)
        assert result.stored == f"s3://results/unit/{job.id}.json" and not result.choices
        wait_until(lambda: job.get_status() is JobStatus.FINISHED)
        assert job.return_value()["stored"] == result.stored
    stored = boto3.client("s3", endpoint_url=s3_endpoint).get_object(Bucket="results", Key=f"unit/{job.id}.json")
    assert json.loads(stored["Body"].read())["choices"][0]["text"] == stream_text(redis_client, job.id)


def test_two_queues_are_drained_in_the_order_of_their_classes(redis_url: str, redis_client: redis.Redis) -> None:
    low, high = rq_queue(redis_client, "promptmill:low"), rq_queue(redis_client, "promptmill:high")
    last = [low.enqueue(FUNCTION, prompt="Hello", max_tokens=2) for _ in range(3)]
    first = [high.enqueue(FUNCTION, prompt="Hello", max_tokens=2) for _ in range(3)]
    with WorkerThread(redis_url) as worker:
        for job in [*first, *last]:
            wait_for_result(redis_client, job.id)
        assert worker.engine.submitted == [f"{job.id}:1" for job in [*first, *last]]
