"""A Redis that is far away: each round trip takes 200 ms. It costs time, and nothing else."""

import signal
import time
from collections.abc import Iterator

import pytest
import redis
from rq import Queue

from producer import Client
from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.tcp_proxy import DelayingProxy
from tests.fakes.worker_runs import (
    SHORT_LEASE_SECONDS,
    WorkerProcess,
    WorkerThread,
    enqueue_many,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.scripts import Scripts

ROUND_TRIP_SECONDS = 0.2


@pytest.fixture
def slow_url(redis_client: redis.Redis) -> Iterator[str]:
    port = redis_client.connection_pool.connection_kwargs["port"]
    with DelayingProxy(port, ROUND_TRIP_SECONDS) as proxy:
        yield proxy.url


def test_jobs_keep_their_leases_and_their_streams_their_order(slow_url: str, redis_client: redis.Redis) -> None:
    engine = FakeEngine(step_seconds=0.01)
    with (
        WorkerThread(slow_url, engine, lease_seconds=SHORT_LEASE_SECONDS, max_num_seqs=16),
        Client(slow_url) as client,
    ):
        jobs = client.submit_many([{"prompt": f"Job {at}", "max_tokens": 200} for at in range(32)])
        shown = "".join(chunk.text for chunk in jobs[0].stream())
        for result in client.as_completed(jobs):
            assert (result.status, result.attempts) == ("finished", 1)
            assert stream_text(redis_client, result.job_id) == result.text
        assert shown == jobs[0].result().text
        wait_for_no_leftovers(redis_client)
    assert len(engine.submitted) == 32


@pytest.mark.alone
def test_sigterm_gives_the_jobs_back_in_time_and_says_so(
    slow_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    ids = enqueue_many(queue, 20, max_tokens=4000)
    with WorkerProcess(slow_url, step_seconds=0.1) as worker:
        worker.wait_until_serving()
        wait_for_entries(redis_client, ids, 2)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert queue.get_job_ids() == ids


def test_the_jobs_of_a_dead_worker_come_back(slow_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    [job_id] = enqueue_many(queue, 1, max_tokens=3)
    Scripts().claim(
        redis_client, request_id="r", worker="dead", queues=[queue.name], max_jobs=1, lease_seconds=SHORT_LEASE_SECONDS
    )
    redis_client.zadd(keys.leases_key(queue.name), {job_id: time.time() - 1})
    with WorkerThread(slow_url, lease_seconds=SHORT_LEASE_SECONDS):
        result = wait_for_result(redis_client, job_id)
        assert (result.status, result.attempts) == ("finished", 2)
        wait_for_no_leftovers(redis_client)
