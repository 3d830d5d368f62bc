"""A Redis whose disk is full refuses to write (MISCONF) until there is room: for us it is away meanwhile.

A limit on the size of the server's files stands for the disk.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx2
import pytest
import redis

import worker.embedded_redis
from producer import Client, RedisUnavailableError
from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.gateways import running_gateway
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    SHORT_LEASE_SECONDS,
    WorkerThread,
    enqueue_many,
    rq_queue,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.embedded_redis import EmbeddedRedis, find_server

FullDisk = Callable[[EmbeddedRedis, redis.Redis], AbstractContextManager[None]]
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedRedis]:
    """One that is told of a file that grew too large, instead of ended."""
    deaf = tmp_path / "redis-server"
    deaf.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{find_server()}' \"$@\"\n")
    deaf.chmod(0o700)
    monkeypatch.setattr(worker.embedded_redis, "find_server", lambda: str(deaf))
    with EmbeddedRedis(data_dir=tmp_path / "data") as server:
        yield server


def is_refusing(client: redis.Redis) -> bool:
    try:
        client.set("anything", 1)
    except redis.ResponseError as error:
        return "MISCONF" in str(error)
    return False


@contextmanager
def full_log(server: EmbeddedRedis, client: redis.Redis) -> Iterator[None]:
    """The append-only file cannot grow."""
    size = max(path.stat().st_size for path in (server.data_dir / "appendonlydir").iterdir())
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, UNLIMITED))
    wait_until(lambda: is_refusing(client))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    wait_until(lambda: not is_refusing(client))


@contextmanager
def full_snapshot(server: EmbeddedRedis, client: redis.Redis) -> Iterator[None]:
    """The last snapshot failed, and stop-writes-on-bgsave-error is yes, as it is by default."""
    client.config_set("appendonly", "no")
    client.config_set("save", "3600 1")
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, UNLIMITED))
    client.bgsave()
    wait_until(lambda: is_refusing(client))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    client.bgsave()
    wait_until(lambda: not is_refusing(client))


@pytest.mark.parametrize("full_disk", [full_log, full_snapshot])
def test_a_full_disk_costs_jobs_nothing_but_time(server: EmbeddedRedis, full_disk: FullDisk) -> None:
    """Longer than a lease: claims, tokens, commits and heartbeats are refused, and the engine goes on."""
    with (
        redis.Redis.from_url(server.url) as client,
        WorkerThread(server.url, FakeEngine(step_seconds=0.02), lease_seconds=SHORT_LEASE_SECONDS) as worker_thread,
        WorkerThread(server.url, FakeEngine(step_seconds=0.02), lease_seconds=SHORT_LEASE_SECONDS) as other,
    ):
        ids = enqueue_many(rq_queue(client), 8, max_tokens=100)
        wait_for_entries(client, ids, 2)
        with full_disk(server, client):
            wait_until(lambda: not (worker_thread.engine.running or other.engine.running))
            num_stored = [client.xlen(keys.stream_key(job_id)) for job_id in ids]
            wait_until(lambda: client.zcount(keys.leases_key(keys.DEFAULT_QUEUE), "-inf", client.time()[0]) == 8)
            assert num_stored == [client.xlen(keys.stream_key(job_id)) for job_id in ids]
        for job_id in ids:
            result = wait_for_result(client, job_id)
            assert (result.status, result.attempts, len(result.choices[0].token_ids)) == ("finished", 1, 100)
            assert stream_text(client, job_id) == result.text
        wait_for_no_leftovers(client)
        assert len(worker_thread.engine.submitted) + len(other.engine.submitted) == 8  # nothing was generated twice


def test_who_submits_while_the_disk_is_full_is_told_to_try_again(server: EmbeddedRedis) -> None:
    with (
        redis.Redis.from_url(server.url) as client,
        Client(server.url) as producer,
        WorkerThread(server.url),
        running_gateway(server.url) as gateway,
    ):
        ask = {"model": "fake", "prompt": "Hello", "max_tokens": 3}
        wait_until(lambda: httpx2.get(f"{gateway.url}/health").status_code == 200)
        with full_log(server, client):
            with pytest.raises(RedisUnavailableError, match=r"does not serve now.*see to the server"):
                producer.submit("Hello", max_tokens=3)
            upload = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"{}")}}
            for path, body in (("completions", {"json": ask}), ("files", upload)):
                refused = httpx2.post(f"{gateway.url}/v1/{path}", **body, timeout=30)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "2"), path
                assert refused.json()["error"]["code"] == "queue_unavailable"
            assert httpx2.get(f"{gateway.url}/health", timeout=30).json()["redis"] == "reachable"  # it can be read
        assert producer.submit("Hello", max_tokens=3).result(timeout=30).status == "finished"
        assert httpx2.post(f"{gateway.url}/v1/completions", json=ask, timeout=30).status_code == 200
