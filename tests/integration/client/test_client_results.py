"""Waiting for results on a real Redis: one job, thousands, failures, expiry."""

import threading
from collections import Counter
from contextlib import closing

import pytest
import redis
from rq.job import Job as RqJob
from rq.job import JobStatus as RqStatus
from rq.serializers import JSONSerializer

from producer import (
    Client,
    JobFailedError,
    JobNotFoundError,
    JobStatus,
    Result,
    ResultTimeoutError,
)
from producer.contract import ErrorCode, keys
from producer.operations import Protocol
from producer.results import MAX_ENDED_A_LOOK, ResultCollector
from producer.transport import Transport
from tests.fakes.fake_worker import FakeWorker, echo


def test_a_result_is_waited_for_and_can_be_asked_for_again(client: Client, worker: FakeWorker) -> None:
    job = client.submit("one two three", n=2, metadata={"row": 7})
    with worker.serving(echo):
        result = job.result(timeout=30)
    assert result.text == "one two three "
    assert [choice.finish_reason for choice in result.choices] == ["length", "length"]
    assert result.metadata == {"row": 7}
    assert client.job(job.id).result(timeout=20) == result
    assert job.status() is JobStatus.FINISHED


def test_a_result_that_is_not_announced_is_found_all_the_same(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    waiting = threading.Event()
    found: list[Result] = []

    def wait() -> None:
        waiting.set()
        found.append(job.result(timeout=60))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(30)
    held = worker.claim().begin()
    held.write("quiet", finish_reason="stop")
    held.end(publish=False)
    thread.join(60)
    assert found[0].text == "quiet"


def test_a_failed_job_raises_with_its_partial_result(client: Client, worker: FakeWorker) -> None:
    job = client.submit("fail now")
    with worker.serving(echo), pytest.raises(JobFailedError, match="told to fail") as error:
        job.result(timeout=30)
    assert error.value.job_id == job.id
    assert error.value.error.code is ErrorCode.ENGINE_ERROR
    assert error.value.result is not None and error.value.result.text == "fail "
    assert job.status() is JobStatus.FAILED


def test_an_unknown_job_is_not_waited_for(client: Client) -> None:
    with pytest.raises(JobNotFoundError, match="results are kept for 24 h"):
        client.job("nobody").result(timeout=30)
    with pytest.raises(JobNotFoundError):
        client.status("nobody")


def test_a_finished_job_whose_result_is_gone_is_not_found(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    with worker.serving(echo):
        job.result(timeout=30)
    redis_client.delete(keys.result_key(job.id))
    with pytest.raises(JobNotFoundError, match="its result is gone"):
        job.result(timeout=30)


def test_a_result_outlives_rqs_record_of_the_job(client: Client, worker: FakeWorker, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    with worker.serving(echo):
        job.result(timeout=30)
    redis_client.delete(f"rq:job:{job.id}")
    assert client.job(job.id).result(timeout=20).text == "a "
    assert client.status(job.id) is JobStatus.FINISHED


def test_a_job_that_rq_failed_raises_with_rqs_reason(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    found = RqJob.fetch(job.id, connection=redis_client, serializer=JSONSerializer)
    with redis_client.pipeline() as pipeline:
        found.set_status(RqStatus.FAILED, pipeline=pipeline)
        found._handle_failure("Traceback\nAbandonedJobError: lapsed", pipeline=pipeline)
        pipeline.execute()
    with pytest.raises(JobFailedError, match="AbandonedJobError: lapsed"):
        job.result(timeout=30)


def test_the_reason_of_a_foreign_worker_is_read_compressed_or_not(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    redis_client.hset(f"rq:job:{job.id}", mapping={"status": "failed", "exc_info": "Traceback\nOSError: no disk"})
    with pytest.raises(JobFailedError, match="OSError: no disk"):
        job.result(timeout=30)


def test_a_reason_that_cannot_be_read_is_said_to_be_none(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    redis_client.hset(f"rq:job:{job.id}", "status", "failed")
    redis_client.xadd(f"rq:results:{job.id}", {"exc_string": b"abcde"})
    with pytest.raises(JobFailedError, match="RQ ended the job without a reason"):
        job.result(timeout=30)


def test_no_result_within_the_timeout_raises_and_the_job_goes_on(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    with pytest.raises(ResultTimeoutError, match=rf"job {job.id} has not ended within 0\.1 s"):
        job.result(timeout=0.1)
    assert job.status() is JobStatus.QUEUED
    with worker.serving(echo):
        assert job.result(timeout=30).text == "a "


def test_results_come_as_jobs_end_failed_and_forgotten_ones_too(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    jobs = client.submit_many([{"prompt": f"job {i}"} for i in range(300)] + [{"prompt": "fail this"}])
    first = worker.claim()
    echo(first)
    outcomes = client.as_completed([*jobs, "nobody"], timeout=60)
    early = {next(outcomes).job_id, next(outcomes).job_id}
    assert early == {first.job_id, "nobody"}
    with worker.serving(echo):
        results = list(outcomes)
    assert Counter(result.status for result in results) == {"finished": 299, "failed": 1}
    assert {result.job_id for result in results} | early == {job.id for job in jobs} | {"nobody"}


def test_very_many_that_ended_before_are_handed_out_some_at_a_time_and_each_once(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    ids = [f"job-{number}" for number in range(3 * MAX_ENDED_A_LOOK + 7)]
    with redis_client.pipeline() as pipeline:
        for job_id in ids:
            pipeline.hset(f"rq:job:{job_id}", mapping={"status": "finished", "origin": "promptmill"})
            pipeline.set(keys.result_key(job_id), Result(job_id=job_id, status="finished").to_wire())
        pipeline.execute()
    collector = ResultCollector(dict.fromkeys(ids, "promptmill"), 30)

    def collect() -> Protocol[list[list[str]]]:
        taken = []
        while collector.num_pending:
            taken.append([outcome.job_id for outcome in (yield from collector.next_ended())])
        return taken

    with closing(Transport(redis_url)) as transport:
        taken = transport.run(collect())
    assert sorted(job_id for some in taken for job_id in some) == sorted(ids)
    assert max(map(len, taken)) <= MAX_ENDED_A_LOOK


def test_a_forgotten_job_has_a_code_of_its_own(client: Client) -> None:
    [result] = client.as_completed(["nobody"])
    assert (result.status, result.error and result.error.code) == ("failed", ErrorCode.JOB_NOT_FOUND)


def test_waiting_for_many_jobs_has_one_timeout(client: Client, worker: FakeWorker) -> None:
    jobs = client.submit_many([{"prompt": "a"}] * 3)
    echo(worker.claim())
    outcomes = client.as_completed(jobs, timeout=0.3)
    assert next(outcomes).status == "finished"
    with pytest.raises(ResultTimeoutError, match="2 jobs have not ended"):
        next(outcomes)


def test_jobs_of_several_queues_are_waited_for_together(client: Client, redis_url: str) -> None:
    jobs = [client.submit("a", queue="first"), client.submit("b", queue="second")]
    workers = [FakeWorker(redis_url, queue="first"), FakeWorker(redis_url, queue="second")]
    with workers[0].serving(echo), workers[1].serving(echo):
        results = list(client.as_completed([jobs[0], jobs[1].id], timeout=30))
    assert sorted(result.text for result in results) == ["a ", "b "]
    for worker in workers:
        worker.close()


def test_a_cut_connection_loses_no_result(client: Client, worker: FakeWorker, redis_client: redis.Redis) -> None:
    jobs = client.submit_many([{"prompt": "a"}] * 40)
    outcomes = client.as_completed(jobs, timeout=60)
    echo(worker.claim())
    results = [next(outcomes)]
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    for _ in range(20):
        echo(worker.claim())
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    with worker.serving(echo):
        results += list(outcomes)
    assert {result.job_id for result in results} == {job.id for job in jobs}
    assert len(results) == 40
