"""Workers that die or sleep: what becomes of the jobs they hold."""

import signal
import threading
import time
from collections import Counter

import pytest
import redis
from rq import Queue
from rq.job import JobStatus
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry

from producer.contract import Choice, Chunk, Done, Marker, keys
from tests.fakes.waiting import WAIT_SECONDS, wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    held_without_attempts,
    rq_queue,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)


def test_jobs_of_a_killed_worker_are_swept_and_finished_elsewhere(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerProcess(redis_url, step_seconds=3600, lease_seconds=SHORT_LEASE_SECONDS) as doomed:
        doomed.wait_until_serving()
        ids = enqueue_many(queue, 40, max_tokens=3)
        wait_until(lambda: queue.count == 0)
        with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS) as heir:
            doomed.signal(signal.SIGKILL)
            doomed.wait()
            results = [wait_for_result(redis_client, job_id) for job_id in ids]
            assert {result.status for result in results} == {"finished"}
            assert {result.attempts for result in results} == {2}
            assert heir.engine.submitted == [f"{job_id}:2" for job_id in ids]
            wait_for_no_leftovers(redis_client)


def test_polling_the_registries_beside_it_fails_no_running_job(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Stock RQ fails jobs of the started registry when it counts them (loss mode C)."""
    with WorkerProcess(redis_url, step_seconds=3600, lease_seconds=SHORT_LEASE_SECONDS) as doomed:
        doomed.wait_until_serving()
        ids = enqueue_many(queue, 5, max_tokens=3)
        wait_until(lambda: queue.count == 0)
        doomed.signal(signal.SIGKILL)
        doomed.wait()
    queue.started_job_registry.cleanup(timestamp=int(time.time()) + 3600)
    assert queue.started_job_registry.count == 5 and queue.failed_job_registry.count == 0
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
        assert {wait_for_result(redis_client, job_id).status for job_id in ids} == {"finished"}


def test_an_attempt_that_finds_the_done_entry_only_commits(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Its worker died between the done entry and the commit."""
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
    entries = [
        ("m", Marker(job_id=job.id, attempt=1, worker="dead", prompt_token_ids=[1]).to_wire()),
        ("d", Chunk(job_id=job.id, text="stored", token_ids=[5, 6], finish_reason="stop").to_wire()),
        ("d", Done(job_id=job.id, done=True, status="finished").to_wire()),
    ]
    for seq, (field, wire) in enumerate(entries):
        redis_client.xadd(keys.stream_key(job.id), {field: wire}, id=f"1-{seq}")
    redis_client.hset(job.key, "promptmill_resume", redis_client.hget(job.key, "enqueued_at"))
    with WorkerThread(redis_url) as worker:
        result = wait_for_result(redis_client, job.id)
        assert result.choices == [Choice(index=0, text="stored", token_ids=[5, 6], finish_reason="stop")]
        wait_until(lambda: job.get_status() is JobStatus.FINISHED)
        assert worker.engine.submitted == [] and redis_client.xlen(keys.stream_key(job.id)) == 3
        wait_for_no_leftovers(redis_client)


def test_a_job_that_rq_requeues_starts_over_after_its_done_entry(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        worker.engine.pause()
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4)
        wait_until(lambda: worker.engine.running)
        worker.engine.fail(job.id)
        wait_until(lambda: job.get_status() is JobStatus.FAILED)
        redis_client.delete(keys.result_key(job.id))
        job.requeue()
        worker.engine.go_on()
        result = wait_for_result(redis_client, job.id)
        assert result.status == "finished" and result.attempts == 2
        assert redis_client.ttl(keys.stream_key(job.id)) > 0


def test_a_job_cancelled_while_its_worker_was_dead_gets_its_outcome(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerProcess(redis_url, step_seconds=0.05, lease_seconds=SHORT_LEASE_SECONDS) as doomed:
        doomed.wait_until_serving()
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 2)
        doomed.signal(signal.SIGKILL)
        doomed.wait()
    job.cancel()
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS) as worker:
        result = wait_for_result(redis_client, job.id)
        assert worker.engine.submitted == []
        assert result.status == "cancelled" and result.text
        assert stream_text(redis_client, job.id) == result.text
        wait_for_no_leftovers(redis_client)


def test_a_worker_that_was_stopped_and_woken_writes_nothing_of_its_lost_jobs(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """A zombie: its lease ended while it slept, and another worker has finished its job."""
    times = {"step_seconds": 0.05, "stop_seconds": WAIT_SECONDS}
    with WorkerProcess(redis_url, **times, lease_seconds=SHORT_LEASE_SECONDS) as zombie:  # type: ignore[arg-type]
        zombie.wait_until_serving()
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=100)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 2)
        zombie.signal(signal.SIGSTOP)
        with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
            result = wait_for_result(redis_client, job.id)
            wait_for_no_leftovers(redis_client)
            stored = redis_client.xrange(keys.stream_key(job.id))
            zombie.signal(signal.SIGCONT)
            other = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
            wait_for_result(redis_client, other.id)
        zombie.signal(signal.SIGTERM)
        assert zombie.wait() == 0
    assert redis_client.xrange(keys.stream_key(job.id)) == stored
    assert wait_for_result(redis_client, job.id) == result
    assert job.get_status() is JobStatus.FINISHED


def test_an_engine_that_cannot_go_on_hands_its_jobs_over(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    worker = WorkerThread(redis_url)
    with pytest.raises(Exception, match="fake died"), worker:
        worker.engine.pause()
        ids = enqueue_many(queue, 5, max_tokens=3)
        wait_until(lambda: len(worker.engine.running) == 5)
        worker.engine.die()
        worker.join()
    assert queue.get_job_ids() == ids
    assert held_without_attempts(redis_client) == []


def test_500_jobs_of_5_producers_through_2_workers_all_finish_once(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids: list[str] = []
    lock = threading.Lock()

    def produce() -> None:
        with redis.Redis.from_url(redis_url) as client:
            produced = [job_id for _ in range(10) for job_id in enqueue_many(rq_queue(client), 10, max_tokens=20)]
        with lock:
            ids.extend(produced)

    with WorkerProcess(redis_url, max_num_seqs=32) as one, WorkerProcess(redis_url, max_num_seqs=32) as two:
        one.wait_until_serving()
        two.wait_until_serving()
        producers = [threading.Thread(target=produce) for _ in range(5)]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join()
        results = [wait_for_result(redis_client, job_id) for job_id in ids]
        wait_for_no_leftovers(redis_client)
        lines = redis_client.xlen(keys.results_channel(queue.name))
    assert Counter(result.status for result in results) == {"finished": 500}
    assert {result.attempts for result in results} == {1} and lines == 500
    for result in results:
        assert stream_text(redis_client, result.job_id) == result.text
    assert sorted(FinishedJobRegistry(queue=queue).get_job_ids()) == sorted(ids)
    for registry in (StartedJobRegistry, FailedJobRegistry, CanceledJobRegistry):
        assert registry(queue=queue).get_job_ids() == []
    assert queue.count == 0
