"""One job's trouble with Redis is its own: neither the worker's loop nor its heartbeat waits for it."""

import threading

import pytest
import redis
from rq import Queue

import worker.admission
from producer.contract import ErrorCode
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerThread,
    enqueue_many,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker import intake
from worker.outlet.stored_stream import StoredStream
from worker.recovery import read_stored


def begin(redis_url: str, queue: Queue, client: redis.Redis, *, prompt: str = "Hello") -> str:
    """A job that a worker has handed over in mid-generation."""
    with WorkerThread(redis_url) as running:
        running.engine.hold_after(3)
        job_id = queue.enqueue(FUNCTION, prompt=prompt, max_tokens=400).id
        wait_for_entries(client, [job_id], 2)
    return str(job_id)


def refuse_to_read(
    monkeypatch: pytest.MonkeyPatch, job_id: str, until: threading.Event, *, max_tries: int
) -> list[str]:
    """As a proxy that lets no reply of this size through; the jobs that were read, in order."""
    read: list[str] = []

    def read_or_fail(client: redis.Redis, wanted: str) -> StoredStream:
        read.append(wanted)
        if wanted == job_id and not until.is_set():
            raise redis.ConnectionError("Connection closed by server.")
        return read_stored(client, wanted)

    monkeypatch.setattr(intake, "read_ahead", lambda client, claims: {})  # of several, none comes through
    monkeypatch.setattr(intake, "read_stored", read_or_fail)
    monkeypatch.setattr(worker.admission, "UNREAD_SECONDS", (0.1,) * max_tries)
    return read


@pytest.mark.parametrize("prompt", ["Hello", "x" * intake.LONG_REQUEST_BYTES])
def test_a_job_that_cannot_be_read_for_a_while_holds_up_no_other_and_goes_on(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    job_id = begin(redis_url, queue, redis_client, prompt=prompt)
    may_read = threading.Event()
    read = refuse_to_read(monkeypatch, job_id, may_read, max_tries=1000)
    others = enqueue_many(queue, 8, max_tokens=5)
    with WorkerThread(redis_url):
        for other in others:
            assert wait_for_result(redis_client, other).status == "finished"
        wait_until(lambda: read.count(job_id) > 1)  # it is tried again
        may_read.set()
        result = wait_for_result(redis_client, job_id)
        assert (result.status, result.attempts) == ("finished", 2)
        assert stream_text(redis_client, job_id) == result.text
        wait_for_no_leftovers(redis_client)


def test_a_job_that_can_never_be_read_ends_with_the_reason(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = begin(redis_url, queue, redis_client)
    read = refuse_to_read(monkeypatch, job_id, threading.Event(), max_tries=2)
    with WorkerThread(redis_url):
        result = wait_for_result(redis_client, job_id)
        assert result.error is not None and result.error.code is ErrorCode.INTERNAL
        assert "Connection closed by server" in result.error.message and read.count(job_id) == 3
        wait_for_no_leftovers(redis_client)


def test_a_running_job_whose_record_is_overwritten_harms_no_other(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """It counts as deleted. The heartbeat and the sweep of all jobs read the records of each."""
    with WorkerThread(redis_url, FakeEngine(step_seconds=0.02), lease_seconds=SHORT_LEASE_SECONDS) as worker_thread:
        broken, *others = enqueue_many(queue, 4, max_tokens=150)  # longer than two leases
        wait_until(lambda: len(worker_thread.engine.running) == 4)
        redis_client.delete(f"rq:job:{broken}")
        redis_client.set(f"rq:job:{broken}", "no hash")
        results = [wait_for_result(redis_client, job_id) for job_id in (broken, *others)]
        assert [result.status for result in results] == ["cancelled"] + 3 * ["finished"]
        assert {result.attempts for result in results} == {1}
        wait_for_no_leftovers(redis_client)


def test_the_overwritten_record_of_a_dead_workers_job_keeps_no_other_from_coming_back(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    engine = FakeEngine()
    engine.pause()
    with WorkerThread(redis_url, engine, lease_seconds=SHORT_LEASE_SECONDS) as dead:
        broken, other = enqueue_many(queue, 2, max_tokens=60)
        wait_until(lambda: len(engine.running) == 2)
        dead.service._leases.stop(1.0)
        dead.service._loop.hand_over = lambda: 0  # it leaves without a word
    redis_client.delete(f"rq:job:{broken}")
    redis_client.set(f"rq:job:{broken}", "no hash")
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
        assert wait_for_result(redis_client, other).status == "finished"
        assert wait_for_result(redis_client, broken).status == "cancelled"
        wait_for_no_leftovers(redis_client)
