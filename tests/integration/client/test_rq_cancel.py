"""Cancelling jobs that plain RQ has enqueued, put back onto their queue or cancelled itself."""

import redis
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from producer import Client
from producer.contract import ErrorCode, ErrorInfo, keys
from producer.contract.job import MAX_CHOICES
from tests.fakes.fake_worker import FakeWorker, echo


def test_a_job_that_plain_rq_cancelled_gets_its_outcome_from_whoever_waits(
    client: Client, redis_client: redis.Redis
) -> None:
    jobs = client.submit_many([{"prompt": "a"}] * 2)
    for job in jobs:
        RqJob.fetch(job.id, redis_client, JSONSerializer).cancel()
    assert [chunk.finish_reason for chunk in jobs[0].stream(timeout=30)] == ["cancelled"]
    assert jobs[1].result(timeout=30).status == "cancelled"
    assert redis_client.xlen(keys.results_channel("promptmill")) == 2


def test_a_requeued_job_can_be_cancelled_and_its_old_text_is_void(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("old")
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="bad luck"))
    worker.enqueue_again(job.id)
    assert job.cancel() is True
    assert [(chunk.text, chunk.finish_reason) for chunk in job.stream(timeout=10)] == [("", "cancelled")]
    assert job.result(timeout=10).text == ""


def test_a_requeued_job_that_rq_cancelled_has_an_outcome_of_its_own(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    """Also where the run before has left its result alone, whose stream is forgotten sooner."""
    job = client.submit("a")
    held = worker.claim().begin()
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="bad luck"))
    worker.enqueue_again(job.id)
    held.expire_stream()
    RqJob.fetch(job.id, redis_client, JSONSerializer).cancel()
    assert job.cancel() is True
    assert job.result(timeout=10).status == "cancelled"


def test_a_requeued_job_that_was_just_claimed_is_left_to_its_worker(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    echo(worker.claim())
    worker.enqueue_again(job.id)
    held = worker.claim()
    assert job.cancel() is True
    assert held.is_cancelled()


def test_a_pickled_job_can_be_cancelled(client: Client, redis_client: redis.Redis) -> None:
    pickled = Queue("promptmill", connection=redis_client).enqueue("promptmill.generate", prompt="Hello")
    assert client.cancel(pickled.id) is True
    assert client.job(pickled.id).result(timeout=10).status == "cancelled"


def test_a_job_that_asks_for_more_choices_than_any_worker_gives_is_cancelled_as_any_other(
    client: Client, redis_client: redis.Redis
) -> None:
    queue = Queue("promptmill", connection=redis_client, serializer=JSONSerializer)
    for asked, num_choices in ((10**12, 1), (MAX_CHOICES + 1, 1), (MAX_CHOICES, MAX_CHOICES)):
        job = queue.enqueue("promptmill.generate", prompt="Hello", n=asked)
        assert client.cancel(job.id) is True
        assert len(client.job(job.id).result(timeout=10).choices) == num_choices


def test_a_job_whose_metadata_is_no_text_is_cancelled_without_it(client: Client, redis_client: redis.Redis) -> None:
    queue = Queue("promptmill", connection=redis_client, serializer=JSONSerializer)
    odd = queue.enqueue("promptmill.generate", prompt="Hello", metadata={"row": "\ud800"})
    assert client.cancel(odd.id) is True
    assert client.job(odd.id).result(timeout=10).metadata == {}
