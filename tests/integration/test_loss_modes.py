"""The ways in which stock RQ loses or doubles jobs (A to H), each shown not to be ours.

D and H are elsewhere: test_worker_faults (replies lost), test_worker_limits (a ttl that passed in the queue)."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import JobStatus
from rq.worker import BaseWorker

from producer import Client
from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.flaky_redis import FlakyRedis
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    rq_queue,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.commit import MAX_BYTES_AT_ONCE
from worker.fence import FencedRedis
from worker.running_job import RunningJob
from worker.scripts import EndCommit, Scripts


def claim_and_die(client: redis.Redis, queues: list[str]) -> None:
    """All that a worker does before it is killed between the claim and everything else."""
    Scripts().claim(
        client, request_id="last", worker="dead", queues=queues, max_jobs=100, lease_seconds=SHORT_LEASE_SECONDS
    )


def test_a_a_worker_that_dies_right_after_taking_jobs_off_several_queues_loses_none(
    redis_url: str, redis_client: redis.Redis
) -> None:
    queues = keys.class_queues(keys.DEFAULT_QUEUE)
    ids = [job_id for name in queues for job_id in enqueue_many(rq_queue(redis_client, name), 3, max_tokens=3)]
    claim_and_die(redis_client, queues)
    assert all(rq_queue(redis_client, name).count == 0 for name in queues)
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS) as heir:
        results = [wait_for_result(redis_client, job_id) for job_id in ids]
        assert {(result.status, result.attempts) for result in results} == {("finished", 2)}
        assert heir.engine.submitted == [f"{job_id}:2" for job_id in ids]  # in their order
        wait_for_no_leftovers(redis_client)


def test_b_no_intermediate_queue_is_used_that_a_maintenance_pass_could_fail_jobs_from(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 3, max_tokens=3)
    claim_and_die(redis_client, [queue.name])
    assert not redis_client.exists(queue.intermediate_queue_key)
    stock = BaseWorker([queue], connection=redis_client)
    for _ in range(2):  # the first pass of stock RQ notes what is stuck, the second one fails it
        queue.intermediate_queue.cleanup(stock, queue)
    assert queue.failed_job_registry.count == 0
    with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
        assert {wait_for_result(redis_client, job_id).status for job_id in ids} == {"finished"}


@contextmanager
def polling(redis_url: str) -> Iterator[list[int]]:
    """What rq-dashboard and `rq info` look at, all the time; a list with the number of rounds."""
    rounds, is_stopping = [0], threading.Event()

    def poll() -> None:
        with redis.Redis.from_url(redis_url) as client:
            queue = rq_queue(client)
            while not is_stopping.wait(0.01):
                for registry in (queue.started_job_registry, queue.finished_job_registry, queue.failed_job_registry):
                    registry.count, registry.get_job_ids()
                [worker.get_current_executions() for worker in BaseWorker.all(connection=client)]
                rounds[0] += 1

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield rounds
    finally:
        is_stopping.set()
        thread.join()


def test_c_polling_the_registries_while_workers_die_and_recover_changes_nothing(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with polling(redis_url) as rounds:
        with WorkerProcess(redis_url, hold_after=2, lease_seconds=SHORT_LEASE_SECONDS) as doomed:
            doomed.wait_until_serving()
            ids = enqueue_many(queue, 10, max_tokens=40)
            wait_for_entries(redis_client, ids, 2)
            doomed.process.kill()
            doomed.wait()
        info = [sys.executable, "-m", "rq.cli", "info", "--url", redis_url]
        shown = subprocess.run(info, capture_output=True, text=True, check=True, timeout=60)
        assert queue.name in shown.stdout
        queue.started_job_registry.cleanup(timestamp=int(time.time()) + 3600)
        with WorkerThread(redis_url, lease_seconds=SHORT_LEASE_SECONDS):
            results = [wait_for_result(redis_client, job_id) for job_id in ids]
            wait_for_no_leftovers(redis_client)
        assert rounds[0] > 0
    assert {(result.status, result.attempts) for result in results} == {("finished", 2)}
    assert sorted(queue.finished_job_registry.get_job_ids()) == sorted(ids) and queue.failed_job_registry.count == 0


@pytest.mark.parametrize(
    ("options", "max_bytes_at_once"),
    [({}, MAX_BYTES_AT_ONCE), ({}, 0), ({"result_ttl": 0}, 0)],
    ids=["with the done entry", "behind the done entry", "by RQ's handler"],
)
def test_e_a_commit_whose_reply_was_lost_is_no_failed_job(
    options: dict[str, Any],
    max_bytes_at_once: int,
    redis_url: str,
    queue: Queue,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.commit.MAX_BYTES_AT_ONCE", max_bytes_at_once)
    with FlakyRedis.from_url(redis_url) as flaky, WorkerThread(redis_url) as worker:
        loop, real_build = worker.service._loop, worker.service._loop._committer.build
        if max_bytes_at_once == 0:
            flaky.lost_replies = 1
        loop._committer._client = flaky

        def build(job: RunningJob) -> EndCommit | None:
            commit = real_build(job)
            if commit is not None:
                flaky.lost_replies, loop._outlet._client = 1, flaky
            return commit

        loop._committer.build = build
        real = worker.service._outcomes.handle_success

        def handle(running: RunningJob, connection: FencedRedis) -> None:
            real(running, connection)
            if flaky.lost_replies:
                flaky.lost_replies = 0
                raise redis.ConnectionError("the reply was lost")

        worker.service._outcomes.handle_success = handle
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=3, **options)
        result = wait_for_result(redis_client, job.id)
        wait_until(lambda: flaky.lost_replies == 0)
        wait_for_no_leftovers(redis_client)
        assert result.status == "finished" and result.attempts == 1
        assert queue.failed_job_registry.count == 0 and redis_client.xlen(keys.results_channel(queue.name)) == 1


def test_f_a_running_job_that_rq_cancels_stays_cancelled(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        worker.engine.step_seconds = 0.01
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 2)
        job.cancel()
        result = wait_for_result(redis_client, job.id)
        wait_for_no_leftovers(redis_client)
    assert result.status == "cancelled" and stream_text(redis_client, job.id) == result.text
    assert job.get_status() is JobStatus.CANCELED and not worker.engine.running


def test_g_nothing_of_a_failed_job_is_kept_for_ever(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url):
        job = queue.enqueue(FUNCTION, prompt="")
        assert wait_for_result(redis_client, job.id).status == "failed"
        wait_for_no_leftovers(redis_client)
        for key in (job.key, f"rq:results:{job.id}", keys.result_key(job.id), keys.stream_key(job.id)):
            assert 0 < redis_client.ttl(key) <= keys.FAILURE_TTL_SECONDS, key


def test_after_jobs_of_all_kinds_no_key_of_a_job_or_of_a_tenants_results_is_kept_for_ever(
    redis_url: str, redis_client: redis.Redis
) -> None:
    engine = FakeEngine(step_seconds=0.001)
    with Client(redis_url) as client, WorkerThread(redis_url, engine):
        engine.pause()
        first = client.submit("first", max_tokens=4, tenant="acme", n=2, idempotency_key="key")
        jobs = [
            client.submit(name, max_tokens=4, tenant="acme", depends_on=[first]) for name in ("cancelled", "finished")
        ]
        running, other = client.submit("running"), client.submit("other", tenant="other")
        wait_until(lambda: len(engine.running) == 3)
        after = client.submit("after", depends_on=[running])
        assert all(job.cancel() for job in (jobs[0], after, running))
        engine.go_on()
        assert len(list(client.as_completed([first, *jobs, running, after, other], timeout=60))) == 6
        wait_for_no_leftovers(redis_client)
    of_all = (b"rq:queues", b"rq:finished:", b"rq:canceled:", b"promptmill:leased:")
    kept = [key for key in redis_client.scan_iter() if redis_client.ttl(key) == -1 and not key.startswith(of_all)]
    assert kept == []
