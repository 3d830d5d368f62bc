"""A worker whose Redis loses replies, goes away and comes back: every job still ends once."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Retry

from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.redis_reads import stream_rows
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    enqueue_many,
    held_without_attempts,
    leftovers,
    rq_queue,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.embedded_redis import EmbeddedRedis


def check_all_ended_once(client: redis.Redis, finished: list[str], failed: Sequence[str] = ()) -> None:
    results = [wait_for_result(client, job_id) for job_id in [*finished, *failed]]
    wait_for_no_leftovers(client)
    assert [result.status for result in results] == ["finished"] * len(finished) + ["failed"] * len(failed)
    for result in results:
        assert stream_text(client, result.job_id) == result.text
    queue = rq_queue(client)
    assert sorted(queue.finished_job_registry.get_job_ids()) == sorted(finished)
    assert sorted(queue.failed_job_registry.get_job_ids()) == sorted(failed)
    assert queue.count == 0
    lines = [json.loads(fields[b"d"])["job_id"] for _, fields in stream_rows(client, keys.results_channel(queue.name))]
    assert sorted(lines) == sorted([*finished, *failed])


@pytest.mark.parametrize(("seed", "anywhere"), [(1, False), (2, False), (3, True), (4, True)])
def test_replies_that_are_lost_anywhere_lose_and_double_no_job(
    seed: int, anywhere: bool, redis_url: str, redis_client: redis.Redis
) -> None:
    """Claims, appends, commits, RQ's own handlers and heartbeats are cut at random, at any byte (ways D and E)."""
    port = redis_client.connection_pool.connection_kwargs["port"]
    queue = rq_queue(redis_client)
    with CuttingProxy(port, seed=seed, anywhere=anywhere) as proxy, WorkerThread(proxy.url, max_num_seqs=16):
        proxy.probability = 0.02 if anywhere else 0.1  # of each packet, in both directions; or of each reply
        ids = enqueue_many(queue, 60, max_tokens=30)
        for _ in range(10):
            first = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
            second = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5, depends_on=first)
            ids += [first.id, second.id]
        failing = [queue.enqueue(FUNCTION, prompt="", retry=Retry(max=2)).id for _ in range(10)]
        check_all_ended_once(redis_client, ids, failing)
        assert {wait_for_result(redis_client, job_id).attempts for job_id in failing} == {3}
        proxy.probability = 0.0
        assert proxy.num_cuts > 0


def test_a_worker_that_stops_while_the_reply_to_its_claim_is_lost_gives_those_jobs_back_too(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = rq_queue(redis_client)
    with WorkerThread(redis_url, max_num_seqs=1) as running:
        service = running.service
        claim, has_lost = service._scripts.claim, threading.Event()

        def lose_the_reply(client: redis.Redis, **arguments: Any) -> Any:
            reply = claim(client, **arguments)
            if not reply or not reply[0] or has_lost.is_set():
                return reply
            has_lost.set()
            service.request_stop()
            raise redis.ConnectionError("Connection closed by server.")

        monkeypatch.setattr(service._scripts, "claim", lose_the_reply)
        ids = enqueue_many(queue, 9, max_tokens=5)
        running.join()
    assert has_lost.is_set() and queue.get_job_ids() == ids
    assert held_without_attempts(redis_client) == [] and running.engine.submitted == []


def test_a_worker_whose_first_beat_is_lost_serves_all_the_same(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = WorkerThread(redis_url)
    beat, num_beats = running.service._leases.beat, 0

    def lose_the_first() -> None:
        nonlocal num_beats
        num_beats += 1
        if num_beats == 1:
            raise redis.ConnectionError("Connection closed by server.")
        beat()

    monkeypatch.setattr(running.service._leases, "beat", lose_the_first)
    with running:
        check_all_ended_once(redis_client, enqueue_many(rq_queue(redis_client), 2, max_tokens=5))
        wait_until(lambda: num_beats > 1 and redis_client.exists(keys.worker_key(running.name)))


def test_a_redis_that_dies_and_comes_back_loses_no_job(tmp_path: Path) -> None:
    with EmbeddedRedis(data_dir=tmp_path) as server:
        engine = FakeEngine(step_seconds=0.02)
        with redis.Redis.from_url(server.url) as client, WorkerThread(server.url, engine, lease_seconds=2):
            ids = enqueue_many(rq_queue(client), 20, max_tokens=30)
            wait_until(lambda: any(client.xlen(keys.stream_key(job_id)) > 2 for job_id in ids))
            server.kill()
            wait_until(lambda: not engine.running)  # generated on meanwhile
            server.start()
            check_all_ended_once(client, ids)
            assert all(wait_for_result(client, job_id).attempts == 1 for job_id in ids)
            assert leftovers(client) == []
