"""Jobs of task `embed` on a real Redis, with a fake engine: done once, recomputed after a crash, never half there."""

import base64
import signal
import time
from typing import Any

import boto3
import numpy as np
import pytest
import redis
from rq import Queue
from rq.job import JobStatus

from producer import AsyncClient, Client, InvalidJobError, JobFailedError
from producer.contract import Done, ErrorCode, Marker, keys, parse_entry
from producer.embeddings import INPUTS_A_JOB
from tests.fakes.fake_embeddings import HIDDEN_SIZE, expected_vector
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.redis_reads import stream_rows
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerProcess,
    WorkerThread,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.redis_clock import RedisClock

TEXTS = ["Name three rivers", "the mill", "a"]


def vectors_of(texts: list[str], dimensions: int | None = None) -> list[list[float]]:
    return [expected_vector(FakeTokenizer().encode(text), dimensions).tolist() for text in texts]


def stream_of(client: redis.Redis, job_id: str) -> list[Any]:
    rows = stream_rows(client, keys.stream_key(job_id))
    return [Marker.model_validate_json(f[b"m"]) if b"m" in f else parse_entry(f[b"d"]) for _, f in rows]


def test_a_list_is_one_job_whose_stream_has_its_marker_and_its_end(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(FUNCTION, task="embed", inputs=[*TEXTS, [5, 6, 7]], metadata={"row": 7})
    result = wait_for_result(redis_client, job.id)
    expected = [*vectors_of(TEXTS), expected_vector([5, 6, 7]).tolist()]
    assert (result.status, result.choices, result.metadata) == ("finished", [], {"row": 7})
    assert result.vectors == expected
    assert np.frombuffer(base64.b64decode(result.embeddings[0]), "<f4").tolist() == expected[0]  # type: ignore[index]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (9, 0, 9)
    marker, done = stream_of(redis_client, job.id)
    assert isinstance(marker, Marker) and marker.prompt_token_ids is None
    assert isinstance(done, Done) and done.status == "finished" and done.usage == result.usage
    assert job.get_status() is JobStatus.FINISHED and job.return_value()["embeddings"] == result.embeddings
    [(_, line)] = stream_rows(redis_client, keys.results_channel("promptmill"))
    assert b"embeddings" not in line[b"d"]
    wait_for_no_leftovers(redis_client)


def test_a_client_embeds_one_text_or_many_in_their_order(worker_thread: WorkerThread, client: Client) -> None:
    many = [f"text number {i}" for i in range(2 * INPUTS_A_JOB + 3)]
    assert client.embed(many, timeout=60) == vectors_of(many)
    assert len(worker_thread.engine.submitted) == 3
    assert client.embed("the mill", timeout=60) == vectors_of(["the mill"])[0]
    assert client.embed([5, 6], timeout=60) == expected_vector([5, 6]).tolist()
    assert client.embed(["a"], dimensions=3, timeout=60) == vectors_of(["a"], 3)
    job = client.submit("the mill", task="embed")
    assert list(job.stream(timeout=60)) == [] and job.result(60).vectors == vectors_of(["the mill"])
    key = {"idempotency_key": "once"}
    assert client.embed(many, timeout=60, **key) == client.embed(many, timeout=60, **key)
    assert len(worker_thread.engine.submitted) == 10


async def test_the_asyncio_client_embeds_alike(worker_thread: WorkerThread, redis_url: str) -> None:
    async with AsyncClient(redis_url) as client:
        assert await client.embed(TEXTS, timeout=60) == vectors_of(TEXTS)
        assert await client.embed("a", timeout=60) == vectors_of(["a"])[0]


def test_what_cannot_be_embedded_is_refused_by_its_field(worker_thread: WorkerThread, client: Client) -> None:
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (["a", [5] * 4097], {}, "inputs[1]"),
        (["a", [1000]], {}, "inputs[1]"),
        (["a", " "], {}, "inputs[1]"),
        (["a"], {"dimensions": HIDDEN_SIZE + 1}, "dimensions"),
    ]
    for inputs, fields, param in refused:
        with pytest.raises(JobFailedError) as failure:
            client.embed(inputs, timeout=60, **fields)
        assert failure.value.error.param == param, failure.value
    invalid: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "inputs"),
        (["a"], {"temperature": 0.5}, "requests[0].temperature"),
    ]
    for inputs, fields, param in invalid:
        with pytest.raises(InvalidJobError) as refusal:
            client.embed(inputs, **fields)
        assert refusal.value.param == param


def test_who_stops_waiting_cancels_all_its_jobs(worker_thread: WorkerThread, client: Client) -> None:
    worker_thread.engine.pause()
    with pytest.raises(TimeoutError):
        client.embed(["a"] * (INPUTS_A_JOB + 1), timeout=0.5)
    wait_until(lambda: not worker_thread.engine.running)


def test_a_job_that_is_cut_short_has_no_vectors(
    worker_thread: WorkerThread, client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_thread.engine.pause()
    cancelled = client.submit(task="embed", inputs=TEXTS)
    deadline = time.time() + 3600
    late = client.submit(task="embed", inputs=TEXTS, deadline=deadline)
    wait_until(lambda: len(worker_thread.engine.running) == 2)
    assert cancelled.cancel() and cancelled.result(60).status == "cancelled"
    monkeypatch.setattr(RedisClock, "now", lambda _: deadline)
    with pytest.raises(JobFailedError, match="deadline passed before its embeddings were computed") as failure:
        late.result(60)
    assert failure.value.error.code is ErrorCode.DEADLINE_EXCEEDED
    failed = client.submit(task="embed", inputs=TEXTS)
    wait_until(lambda: worker_thread.engine.running)
    worker_thread.engine.fail(failed.id)
    with pytest.raises(JobFailedError, match="out of luck"):
        failed.result(60)
    for job in (cancelled, late, failed):
        assert wait_for_result(redis_client, job.id).embeddings is None


def test_a_killed_workers_job_is_computed_again_to_the_same(redis_url: str, redis_client: redis.Redis) -> None:
    with (
        Client(redis_url) as client,
        WorkerProcess(redis_url, step_seconds=3600, lease_seconds=SHORT_LEASE_SECONDS) as doomed,
    ):
        doomed.wait_until_serving()
        sleeping = client.submit("Hello", max_tokens=2)
        wait_until(lambda: redis_client.xlen(keys.stream_key(sleeping.id)) == 2)  # its engine takes no second step
        job = client.submit(task="embed", inputs=TEXTS)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)))
        with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
            doomed.signal(signal.SIGKILL)
            doomed.wait()
            result = job.result(60)
            assert result.vectors == vectors_of(TEXTS) and result.attempts == 2
            assert [type(entry) for entry in stream_of(redis_client, job.id)] == [Marker, Marker, Done]
            wait_for_no_leftovers(redis_client)


def test_what_died_between_the_done_entry_and_the_commit_is_computed_again(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Its vectors stood nowhere; for whoever reads the stream the job starts over, and comes to the same."""
    with WorkerThread(redis_url) as first:
        first.service._loop._committer.build = lambda job: None
        first.service._loop._committer.commit = lambda jobs: None  # it dies just before
        job = queue.enqueue(FUNCTION, task="embed", inputs=TEXTS)
        wait_until(lambda: redis_client.ttl(keys.stream_key(job.id)) > 0)
    with WorkerThread(redis_url) as second:
        result = wait_for_result(redis_client, job.id)
        assert (result.status, result.attempts, result.vectors) == ("finished", 2, vectors_of(TEXTS))
        assert second.engine.submitted == [f"{job.id}:2"]
        wait_for_no_leftovers(redis_client)
    first_marker, _, marker, done = stream_of(redis_client, job.id)
    assert not first_marker.reset and marker.reset and isinstance(done, Done)


def test_vectors_lie_in_the_result_store(redis_url: str, redis_client: redis.Redis, s3_endpoint: str) -> None:
    store: dict[str, Any] = {"results": "s3://results/embeddings", "s3_endpoint_url": s3_endpoint}
    with WorkerThread(redis_url, **store), Client(redis_url, s3_endpoint_url=s3_endpoint) as client:
        job = client.submit(task="embed", inputs=TEXTS)
        assert job.result(60).vectors == vectors_of(TEXTS)
        kept = wait_for_result(redis_client, job.id)
        assert kept.embeddings is None and kept.stored == f"s3://results/embeddings/{job.id}.json"
    body = (
        boto3.client("s3", endpoint_url=s3_endpoint)
        .get_object(Bucket="results", Key=f"embeddings/{job.id}.json")["Body"]
        .read()
    )
    assert b'"embeddings":["' in body


def test_a_model_without_an_output_layer_generates_nothing(redis_url: str) -> None:
    engine = FakeEngine()
    object.__setattr__(engine.info, "can_generate", False)
    with WorkerThread(redis_url, engine), Client(redis_url) as client:
        with pytest.raises(JobFailedError, match="no output layer") as failure:
            client.submit("Hello").result(60)
        assert (failure.value.error.code, failure.value.error.param) == (ErrorCode.UNSUPPORTED, "task")
        assert client.embed("a", timeout=60) == vectors_of(["a"])[0]
