"""Results that lie in S3, followed by clients: on a real Redis, against a server of S3's protocol."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from producer import (
    AsyncClient,
    Client,
    JobFailedError,
    JobNotFoundError,
    ResultStoreError,
    s3_connection,
    stored_results,
)
from producer.batch.protocol import BatchOptions
from producer.batch.run import BatchRun
from producer.contract import ErrorCode
from producer.settings import ProducerSettings
from producer.stored_results import MAX_READS_AT_ONCE, ObjectRead, read_object
from tests.fakes.fake_worker import Behaviour, FakeWorker
from tests.fakes.flaky_s3 import FlakyS3
from tests.fakes.storing_worker import storing

NUM_TOGETHER = 4


@pytest.fixture
def store(s3_endpoint: str) -> Behaviour:
    return storing(s3_endpoint)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Barrier]:
    """No object is read unless so many are asked for at the same time."""
    barrier = threading.Barrier(NUM_TOGETHER, timeout=20)

    def read_together(url: str, endpoint_url: str | None) -> ObjectRead:
        barrier.wait()
        return read_object(url, endpoint_url)

    monkeypatch.setattr(stored_results, "read_object", read_together)
    yield barrier


def test_results_in_a_store_are_read_side_by_side(
    redis_url: str, worker: FakeWorker, s3_endpoint: str, store: Behaviour, met: threading.Barrier
) -> None:
    prompts = [f"prompt {number}" for number in range(NUM_TOGETHER)]
    with Client(redis_url, s3_endpoint_url=s3_endpoint) as client:
        jobs = client.submit_many([{"prompt": prompt} for prompt in prompts])
        for _ in jobs:
            store(worker.claim())
        results = {result.job_id: result for result in client.as_completed(jobs, timeout=60)}
    assert [results[job.id].text for job in jobs] == prompts
    assert not met.broken


async def test_results_in_a_store_are_read_side_by_side_in_asyncio(
    redis_url: str, worker: FakeWorker, s3_endpoint: str, store: Behaviour, met: threading.Barrier
) -> None:
    prompts = [f"prompt {number}" for number in range(NUM_TOGETHER)]
    async with AsyncClient(redis_url, s3_endpoint_url=s3_endpoint) as client:
        jobs = await client.submit_many([{"prompt": prompt} for prompt in prompts])
        for _ in jobs:
            store(worker.claim())
        results = {result.job_id: result async for result in client.as_completed(jobs, timeout=60)}
    assert [results[job.id].text for job in jobs] == prompts
    assert not met.broken


def test_a_run_reads_the_results_of_an_earlier_one_side_by_side(
    redis_url: str,
    worker: FakeWorker,
    s3_endpoint: str,
    store: Behaviour,
    met: threading.Barrier,
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": f"prompt {number}"} for number in range(NUM_TOGETHER)]
    lines = [{"custom_id": body["prompt"], "url": "/v1/completions", "body": body} for body in bodies]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ProducerSettings(redis_url=redis_url, s3_endpoint_url=s3_endpoint)

    def run() -> None:
        BatchRun.of_files(settings, source, target, BatchOptions(), lambda progress: None).run()

    met.abort()  # the first run is only there to enqueue: it stumbles over the first result that it reads
    with pytest.raises(threading.BrokenBarrierError), worker.serving(store):
        run()
    for _ in range(worker.connection.llen(f"rq:queue:{worker.queue}")):
        store(worker.claim())
    met.reset()
    run()
    answers = [json.loads(line) for line in target.read_bytes().splitlines()]
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
    assert texts == {body["prompt"]: body["prompt"] for body in bodies}


def test_reads_keep_their_order_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = 0, 0
    changing = threading.Lock()
    is_full = threading.Event()

    def read(url: str, endpoint_url: str | None) -> bytes:
        nonlocal under_way, most
        with changing:
            under_way += 1
            most = max(most, under_way)
            if under_way == MAX_READS_AT_ONCE:
                is_full.set()
        assert is_full.wait(20)
        with changing:
            under_way -= 1
        return url.encode()

    monkeypatch.setattr(stored_results, "read_object", read)
    urls = [f"s3://bucket/{number}" for number in range(5 * MAX_READS_AT_ONCE)]
    assert stored_results.read_objects(urls, None) == [url.encode() for url in urls]
    assert most == MAX_READS_AT_ONCE


def test_all_threads_read_results_in_a_store_through_one_client(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).put_object(Bucket="results", Key="jobs/shared.json", Body=b"whole")
    made: list[str | None] = []
    real_connect = s3_connection.connect
    monkeypatch.setattr(s3_connection, "connect", lambda url: made.append(url) or real_connect(url))
    stored_results._client.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: read_object("s3://results/jobs/shared.json", s3_endpoint), range(40)))
    assert bodies == [b"whole"] * 40 and made == [s3_endpoint]


def test_a_result_in_a_store_is_followed(
    redis_url: str, worker: FakeWorker, s3_endpoint: str, store: Behaviour
) -> None:
    with Client(redis_url, s3_endpoint_url=s3_endpoint) as client, worker.serving(store):
        job = client.submit("far away")
        result = job.result(timeout=60)
        assert (result.text, result.stored) == ("far away", f"s3://results/jobs/{job.id}.json")
        [listed] = client.as_completed([client.submit("far away")], timeout=60)
        assert listed.text == "far away"


def test_a_result_in_a_store_that_cannot_be_read_names_the_remedy(
    redis_url: str, worker: FakeWorker, s3_endpoint: str
) -> None:
    with Client(redis_url, s3_endpoint_url=s3_endpoint) as client:
        job = client.submit("a")
        held = worker.claim().begin()
        held.end(stored="s3://no-such-bucket/a.json")
        with pytest.raises(ResultStoreError, match=r"s3://no-such-bucket/a.*PROMPTMILL_S3_ENDPOINT_URL"):
            job.result(timeout=30)


def test_an_object_that_is_no_result_is_its_jobs_failure_alone(
    redis_url: str, worker: FakeWorker, s3_endpoint: str, store: Behaviour
) -> None:
    with Client(redis_url, s3_endpoint_url=s3_endpoint) as client:
        first, odd = jobs = client.submit_many([{"prompt": prompt} for prompt in "ab"])
        for _ in jobs:
            store(worker.claim())
        boto3.client("s3", endpoint_url=s3_endpoint).put_object(
            Bucket="results", Key=f"jobs/{odd.id}.json", Body=b"overwritten"
        )
        results = {result.job_id: result for result in client.as_completed(jobs, timeout=60)}
        assert results[first.id].text == "a" and results[odd.id].status == "failed"
        error = results[odd.id].error
        assert error is not None and error.code is ErrorCode.RESULT_STORE_ERROR
        assert error.message.startswith(f"the object s3://results/jobs/{odd.id}.json is not a result of job {odd.id}: ")


def test_a_result_that_may_not_be_read_is_its_jobs_failure_alone(
    redis_url: str, worker: FakeWorker, s3_server: FlakyS3, store: Behaviour
) -> None:
    with Client(redis_url, s3_endpoint_url=s3_server.endpoint) as client:
        first, refused, last = jobs = client.submit_many([{"prompt": prompt} for prompt in "abc"])
        for _ in jobs:
            store(worker.claim())
        s3_server.refused.add(f"/results/jobs/{refused.id}.json")
        results = {result.job_id: result for result in client.as_completed(jobs, timeout=60)}
        assert [results[job.id].text for job in (first, last)] == ["a", "c"]
        with pytest.raises(JobFailedError, match=r"AccessDenied.*grant s3:GetObject on it") as error:
            refused.result(timeout=30)
        assert results[refused.id].error == error.value.error
        assert error.value.error.code is ErrorCode.RESULT_STORE_ERROR
        s3_server.refused.clear()
        assert refused.result(timeout=30).text == "b"


def test_a_result_that_was_deleted_from_its_store_holds_up_no_other(
    redis_url: str, worker: FakeWorker, s3_endpoint: str, store: Behaviour
) -> None:
    with Client(redis_url, s3_endpoint_url=s3_endpoint) as client:
        first, deleted, last = jobs = client.submit_many([{"prompt": prompt} for prompt in "abc"])
        for _ in jobs:
            store(worker.claim())
        boto3.client("s3", endpoint_url=s3_endpoint).delete_object(Bucket="results", Key=f"jobs/{deleted.id}.json")
        results = {result.job_id: result for result in client.as_completed(jobs, timeout=60)}
        assert [results[job.id].text for job in (first, last)] == ["a", "c"]
        error = results[deleted.id].error
        assert error is not None and error.code is ErrorCode.JOB_NOT_FOUND
        assert f"s3://results/jobs/{deleted.id}.json is not there" in error.message
        with pytest.raises(JobNotFoundError, match="submitted again"):
            deleted.result(timeout=30)
