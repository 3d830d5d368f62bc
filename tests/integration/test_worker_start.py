"""Where a worker refuses to start, and what it says."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.worker import BaseWorker

from engine.engine import InferenceEngine
from producer import RedisRefusedError, server_version
from producer.contract import keys
from producer.gateway.server import run_gateway
from producer.gateway.settings import GatewaySettings
from producer.transport import Transport
from producer.workers import was_served
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, enqueue_many, wait_for_no_leftovers, wait_for_result
from worker.embedded_redis import EmbeddedRedis
from worker.errors import StartRefusedError
from worker.rq_bridge import RqBridge
from worker.run import run_worker
from worker.settings import WorkerSettings


def test_a_redis_out_of_reach_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(StartRefusedError, match=r"127\.0\.0\.1:1.*--redis-url"):
        run_worker(WorkerSettings(redis_url="redis://127.0.0.1:1/0", model="no-such-model"))


def test_a_model_is_known_from_when_its_first_worker_begins_to_load_it(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a batch that is made meanwhile fails, and a client is told that there is no such model."""

    class Loading(Exception):
        pass

    def load(engine: InferenceEngine) -> None:
        raise Loading

    monkeypatch.setattr(InferenceEngine, "start", load)
    with pytest.raises(Loading):
        run_worker(WorkerSettings(redis_url=redis_url, model="some/new-model", model_names="new,newest"))
    with closing(Transport(redis_url)) as transport:
        assert [transport.run(was_served(name)) for name in ("new", "newest", "other")] == [True, True, False]
    assert 0 < redis_client.ttl(keys.MODELS_KEY) <= keys.MODEL_TTL_SECONDS


def test_a_redis_that_goes_away_while_the_worker_starts_is_a_refusal(tmp_path: Path) -> None:
    with EmbeddedRedis(data_dir=tmp_path) as server:
        worker = WorkerThread(server.url)
        server.kill()
        with pytest.raises(StartRefusedError, match=rf":{server.port}/0 cannot be reached.*--redis-url"), worker:
            worker.join()


@pytest.fixture
def evicting_redis(redis_url: str, redis_client: redis.Redis) -> Iterator[str]:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    yield redis_url
    redis_client.config_set("maxmemory-policy", "noeviction")


def test_a_redis_that_evicts_is_refused_with_the_remedy(evicting_redis: str) -> None:
    with pytest.raises(StartRefusedError, match=r"allkeys-lru.*noeviction"):
        run_worker(WorkerSettings(redis_url=evicting_redis, model="no-such-model"))


def test_a_redis_that_begins_to_evict_is_told_of(evicting_redis: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a replica that a fail-over led to."""
    with WorkerThread(evicting_redis):
        wait_until(lambda: "action=redis_unfit reason=Redis evicts keys" in caplog.text)


def test_a_redis_that_is_too_old_is_refused_by_workers_and_gateways(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings(redis_url=redis_url, model="no-such-model")
    monkeypatch.setattr(server_version, "MIN_SERVER_VERSION", (99, 1))
    with pytest.raises(StartRefusedError, match=r"too old: promptmill needs 99\.1"):
        run_worker(settings)
    with pytest.raises(RedisRefusedError, match=r"too old: promptmill needs 99\.1"):
        run_gateway(GatewaySettings(redis_url=redis_url))


@pytest.mark.parametrize(
    ("version", "is_served"), [("6.0.16", False), ("6.2.14", True), ("7.2.4", True), ("10.0", True)]
)
def test_versions_are_compared_as_numbers(version: str, is_served: bool) -> None:
    assert (server_version.is_too_old({"redis_version": version}) is None) == is_served


def test_a_name_that_a_live_worker_has_is_refused(redis_url: str, redis_client: redis.Redis) -> None:
    live = RqBridge(redis_client, ["promptmill"], name="mill-1")
    live.hostname, live.pid = "elsewhere", 1
    live.register()
    worker = WorkerThread(redis_url, worker_name="mill-1")
    with pytest.raises(StartRefusedError, match="--worker-name"), worker:
        worker.join()
    assert [seen.hostname for seen in BaseWorker.all(connection=redis_client)] == ["elsewhere"]


def test_the_name_of_a_dead_worker_of_this_host_is_taken_over(redis_url: str, redis_client: redis.Redis) -> None:
    dead = RqBridge(redis_client, ["promptmill"], name="mill-1")
    dead.pid = 2**22 + 1  # above Linux's highest pid
    dead.register()
    with WorkerThread(redis_url, worker_name="mill-1"):
        assert [seen.pid for seen in BaseWorker.all(connection=redis_client)] == [os.getpid()]


def test_two_workers_that_share_a_name_lose_and_double_no_job(
    redis_url: str, redis_client: redis.Redis, queue: Queue
) -> None:
    """As in two containers that share the host's name, where both are process 1: neither can tell that the other is no
    earlier life of its own."""
    with WorkerThread(redis_url, FakeEngine(step_seconds=0.005), worker_name="mill-1", max_num_seqs=4) as first:
        with WorkerThread(redis_url, FakeEngine(step_seconds=0.005), worker_name="mill-1", max_num_seqs=4) as second:
            ids = enqueue_many(queue, 40, max_tokens=10)
            assert {wait_for_result(redis_client, job_id).attempts for job_id in ids} == {1}
            submitted = first.engine.submitted + second.engine.submitted
            assert sorted(submitted) == sorted(f"{job_id}:1" for job_id in ids)
            wait_for_no_leftovers(redis_client)
        wait_until(lambda: [seen.name for seen in BaseWorker.all(connection=redis_client)] == ["mill-1"])
        wait_until(lambda: redis_client.exists(keys.worker_key("mill-1")))
        assert wait_for_result(redis_client, enqueue_many(queue, 1, max_tokens=5)[0]).status == "finished"
