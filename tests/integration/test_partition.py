"""A worker that cannot reach Redis for a while, which others reach: what it costs, and that nobody is blamed for it."""

import threading
from functools import partial

import pytest
import redis
from rq import Queue

from producer.contract import Marker, keys
from tests.fakes.fake_engine import FakeEngine, expected_tokens
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.redis_reads import stream_rows
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
from worker.outlet.stream import StreamOutlet
from worker.scripts import BLAMED_FIELD, CRASHES_FIELD

MAX_UNSENT_BYTES = 4000  # a few hundred tokens


def proxy_to(client: redis.Redis) -> CuttingProxy:
    return CuttingProxy(client.connection_pool.connection_kwargs["port"], seed=1)


def test_a_job_whose_output_no_longer_fits_in_memory_is_given_up_and_goes_on_from_the_store(
    redis_client: redis.Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service.StreamOutlet", partial(StreamOutlet, max_unsent_bytes=MAX_UNSENT_BYTES))
    with proxy_to(redis_client) as proxy, WorkerThread(proxy.url, lease_seconds=SHORT_LEASE_SECONDS) as worker:
        worker.engine.hold_after(5)
        long = queue.enqueue(FUNCTION, prompt=[1, 2], max_tokens=3000, seed=5).id
        wait_for_entries(redis_client, [long], 2)
        with proxy.partition():
            worker.engine.go_on()
            wait_until(lambda: f"{long}:1" not in worker.engine.running)
            assert not redis_client.exists(keys.result_key(long))
        (short,) = enqueue_many(queue, 1, max_tokens=3)
        result = wait_for_result(redis_client, long)
        assert wait_for_result(redis_client, short).attempts == 1
        wait_for_no_leftovers(redis_client)
    assert (result.status, result.attempts) == ("finished", 2)
    request = worker.engine.requests[0]
    assert result.choices[0].token_ids == expected_tokens(request.prompt_token_ids, request.params)
    assert result.text == stream_text(redis_client, long)
    assert 0 < worker.engine.num_resumed_tokens[f"{long}:2"] < 3000
    (marker,) = [fields[b"m"] for row, fields in stream_rows(redis_client, keys.stream_key(long)) if row == b"2-0"]
    assert not Marker.model_validate_json(marker).reset


def test_a_job_whose_worker_was_only_cut_off_is_no_suspect(
    redis_url: str, redis_client: redis.Redis, queue: Queue
) -> None:
    """It counts as a crash until the worker is back, and says that it lived."""
    engines = [FakeEngine() for _ in range(2)]
    for engine in engines:
        engine.pause()
    with proxy_to(redis_client) as proxy, WorkerThread(proxy.url, engines[0], lease_seconds=SHORT_LEASE_SECONDS):
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5).id
        wait_until(lambda: engines[0].running)
        with WorkerThread(redis_url, engines[1], lease_seconds=SHORT_LEASE_SECONDS):
            with proxy.partition():
                wait_until(lambda: engines[1].running)
                assert redis_client.hmget(f"rq:job:{job}", CRASHES_FIELD, BLAMED_FIELD) == [b"1:1", b"1 "]
            wait_until(lambda: redis_client.hget(f"rq:job:{job}", CRASHES_FIELD) == b"0:1")
            wait_until(lambda: not engines[0].running)
            engines[1].go_on()
            assert wait_for_result(redis_client, job).attempts == 2
            wait_for_no_leftovers(redis_client)


def test_it_is_no_suspect_either_where_an_append_tells_its_worker_before_a_beat_does(
    redis_url: str, redis_client: redis.Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, may_beat = [FakeEngine() for _ in range(2)], threading.Event()
    for engine in engines:
        engine.pause()
    with (
        proxy_to(redis_client) as proxy,
        WorkerThread(proxy.url, engines[0], lease_seconds=SHORT_LEASE_SECONDS) as cut_off,
    ):
        beat = cut_off.service._leases.beat

        def beat_later() -> None:
            if not may_beat.is_set():
                raise redis.ConnectionError("not yet")
            beat()

        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5).id
        wait_until(lambda: engines[0].running)
        with WorkerThread(redis_url, engines[1], lease_seconds=SHORT_LEASE_SECONDS):
            with proxy.partition():
                monkeypatch.setattr(cut_off.service._leases, "beat", beat_later)
                wait_until(lambda: engines[1].running)
                engines[0].go_on()  # to an end that it cannot tell anybody
                wait_until(lambda: not engines[0].running)
            wait_until(lambda: not cut_off.service._loop.held.claims())
            assert redis_client.hget(f"rq:job:{job}", CRASHES_FIELD) == b"1:1"
            may_beat.set()
            wait_until(lambda: redis_client.hget(f"rq:job:{job}", CRASHES_FIELD) == b"0:1")
            engines[1].go_on()
            assert wait_for_result(redis_client, job).attempts == 2
            wait_for_no_leftovers(redis_client)
