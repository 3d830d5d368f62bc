"""SIGTERM, SIGINT and SIGHUP to real worker processes, whatever they are at."""

import os
import signal
import time
from pathlib import Path

import pytest
import redis
from rq import Queue

from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    STARTING_KEY,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    held_without_attempts,
    rq_queue,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.embedded_redis import EmbeddedRedis

pytestmark = pytest.mark.alone

MAX_END_SECONDS = 2.0  # promised


def end_in_time(worker: WorkerProcess, number: signal.Signals) -> int:
    began = time.monotonic()
    worker.signal(number)
    code = worker.wait()
    assert time.monotonic() - began < MAX_END_SECONDS
    return code


def test_sigterm_gives_256_running_jobs_back_in_order_within_two_seconds(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 300, max_tokens=4000)
    with WorkerProcess(redis_url, step_seconds=0.1) as worker:
        worker.wait_until_serving()
        wait_until(lambda: queue.count == 300 - 288)  # 256 and the prefetch
        assert end_in_time(worker, signal.SIGTERM) == 0
    assert queue.get_job_ids() == ids
    assert held_without_attempts(redis_client) == []
    assert {redis_client.hget(f"rq:job:{job_id}", "status") for job_id in ids} == {b"queued"}


def test_256_jobs_that_were_handed_over_go_on_elsewhere_at_once(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 256, max_tokens=60)
    with WorkerProcess(redis_url, step_seconds=0.2) as worker:
        worker.wait_until_serving()
        wait_for_entries(redis_client, ids, 2)
        assert end_in_time(worker, signal.SIGTERM) == 0
    with WorkerThread(redis_url) as heir:
        results = [wait_for_result(redis_client, job_id) for job_id in ids]
        assert {(result.status, result.attempts) for result in results} == {("finished", 2)}
        assert all(heir.engine.num_resumed_tokens[f"{job_id}:2"] > 0 for job_id in ids)
        for result in results:
            assert stream_text(redis_client, result.job_id) == result.text
        wait_for_no_leftovers(redis_client)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_engine_hangs_ends_the_process_in_time(
    redis_url: str, queue: Queue, number: signal.Signals
) -> None:
    ids = enqueue_many(queue, 3, max_tokens=4000)
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and a worker leaves it so
    with WorkerProcess(redis_url, step_seconds=3600) as worker:
        signal.signal(number, inherited)
        worker.wait_until_serving()
        wait_until(lambda: queue.count == 0)
        assert end_in_time(worker, number) == 0
    assert queue.get_job_ids() == ids


def test_sigterm_while_uploads_hang_ends_the_process_in_time(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 20, max_tokens=2)
    with WorkerProcess(redis_url, hanging_store=True) as worker:
        worker.wait_until_serving()
        wait_for_entries(redis_client, ids, 2)
        assert end_in_time(worker, signal.SIGTERM) == 0
    assert queue.get_job_ids() == ids
    assert held_without_attempts(redis_client) == []


def test_an_idle_worker_ends_at_once_and_leaves_no_trace(redis_url: str, redis_client: redis.Redis) -> None:
    with WorkerProcess(redis_url) as worker:
        worker.wait_until_serving()
        assert end_in_time(worker, signal.SIGTERM) == 0
    assert redis_client.zcard(keys.WORKERS_KEY) == 0 and redis_client.scard("rq:workers") == 0
    assert list(redis_client.scan_iter("promptmill:worker:*")) == []


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("num_jobs", [0, 1])
def test_a_stop_while_redis_is_away_is_orderly_where_no_job_waits_for_the_end_of_its_lease(
    trouble: signal.Signals, num_jobs: int
) -> None:
    with EmbeddedRedis() as server, WorkerProcess(server.url, step_seconds=3600) as worker:
        worker.wait_until_serving()
        with redis.Redis.from_url(server.url) as client:
            enqueue_many(rq_queue(client), num_jobs, max_tokens=4000)
            wait_until(lambda: client.zcard(keys.leases_key(keys.DEFAULT_QUEUE)) == num_jobs)
        os.kill(server.pid, trouble)
        try:
            code = end_in_time(worker, signal.SIGTERM)
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert (code == 0) == (num_jobs == 0)


def test_drain_finish_ends_the_running_jobs_and_claims_no_more(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    running = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=100)
    with WorkerProcess(redis_url, step_seconds=0.01, drain="finish") as worker:
        worker.wait_until_serving()
        wait_until(lambda: redis_client.xlen(keys.stream_key(running.id)) > 1)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert wait_for_result(redis_client, running.id).status == "finished"
    wait_for_no_leftovers(redis_client)


def test_drain_seconds_limits_what_drain_finish_waits_for(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    short = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=20)
    long = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
    with WorkerProcess(redis_url, step_seconds=0.02, drain="finish", drain_seconds=1.5) as worker:
        worker.wait_until_serving()
        wait_until(lambda: redis_client.xlen(keys.stream_key(long.id)) > 1)
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert time.monotonic() - began < 1.5 + MAX_END_SECONDS
    assert wait_for_result(redis_client, short.id).status == "finished"
    assert queue.get_job_ids() == [long.id]


def test_a_second_signal_hands_over_what_drain_finish_would_end(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    job, log = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000), tmp_path / "log"
    with WorkerProcess(redis_url, step_seconds=0.05, drain="finish", log=log) as worker:
        worker.wait_until_serving()
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)) > 1)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "action=draining num_jobs=1" in log.read_text())  # two signals at once are but one
        late = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
        assert end_in_time(worker, signal.SIGTERM) == 0
    assert queue.get_job_ids() == [job.id, late.id]


def test_a_signal_while_the_model_is_loading_ends_the_process(redis_url: str, redis_client: redis.Redis) -> None:
    with WorkerProcess(redis_url, hanging_start=True) as worker:
        wait_until(lambda: redis_client.exists(STARTING_KEY))
        assert end_in_time(worker, signal.SIGTERM) == 0


def test_a_second_signal_ends_the_process_at_once(redis_url: str, queue: Queue) -> None:
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=4000)
    with WorkerProcess(redis_url, step_seconds=3600) as worker:
        worker.wait_until_serving()
        wait_until(lambda: queue.count == 0)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: queue.get_job_ids() == [job.id])  # handed over; the engine hangs
        end_in_time(worker, signal.SIGTERM)
