"""Redis goes away for longer than a lease, is full, fails over, stands still: what it costs a job is time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from producer import AsyncClient, Client
from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.sentinel_trio import SentinelTrio
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    SHORT_LEASE_SECONDS,
    WorkerThread,
    enqueue_many,
    rq_queue,
    stream_text,
    wait_for_entries,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.embedded_redis import EmbeddedRedis
from worker.scripts import CRASHES_FIELD


def check_undisturbed(client: redis.Redis, ids: list[str]) -> None:
    """Every job ended once, in its first attempt, with a whole stream; nobody was counted as crashed."""
    for job_id in ids:
        result = wait_for_result(client, job_id)
        assert (result.status, result.attempts) == ("finished", 1)
        assert stream_text(client, job_id) == result.text
        assert not client.hexists(f"rq:job:{job_id}", CRASHES_FIELD)
    wait_for_no_leftovers(client)
    assert client.xlen(keys.results_channel(keys.DEFAULT_QUEUE)) == len(ids)


def wait_for_first_tokens(client: redis.Redis, ids: list[str]) -> None:
    wait_for_entries(client, ids, 2)


def sleep_longer_than_a_lease() -> None:
    time.sleep(2 * SHORT_LEASE_SECONDS)  # the one thing that is waited for here is time itself


def test_a_redis_that_stands_still_for_longer_than_a_lease_costs_no_attempt(tmp_path: Path) -> None:
    """Two workers: neither may take the other's jobs for those of a dead one."""
    with EmbeddedRedis(data_dir=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        engines = [FakeEngine(step_seconds=0.05) for _ in range(2)]
        with (
            WorkerThread(server.url, engines[0], lease_seconds=SHORT_LEASE_SECONDS, max_num_seqs=8),
            WorkerThread(server.url, engines[1], lease_seconds=SHORT_LEASE_SECONDS, max_num_seqs=8),
        ):
            ids = enqueue_many(rq_queue(client), 16, max_tokens=60)
            wait_for_first_tokens(client, ids)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                sleep_longer_than_a_lease()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            check_undisturbed(client, ids)
        assert sum(len(engine.submitted) for engine in engines) == 16  # nothing was generated twice


def test_a_redis_that_is_down_for_longer_than_a_lease_and_restarts_from_its_file_costs_no_attempt(
    tmp_path: Path,
) -> None:
    with EmbeddedRedis(data_dir=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        engines = [FakeEngine(step_seconds=0.05) for _ in range(2)]
        with (
            WorkerThread(server.url, engines[0], lease_seconds=SHORT_LEASE_SECONDS, max_num_seqs=8),
            WorkerThread(server.url, engines[1], lease_seconds=SHORT_LEASE_SECONDS, max_num_seqs=8),
        ):
            ids = enqueue_many(rq_queue(client), 16, max_tokens=100)
            wait_for_first_tokens(client, ids)
            client.execute_command("WAITAOF", 1, 0, 5000)  # what is acknowledged is in the file
            server.kill()
            sleep_longer_than_a_lease()
            server.start()
            check_undisturbed(client, ids)
        assert sum(len(engine.submitted) for engine in engines) == 16


def test_a_full_redis_is_one_that_is_away(redis_url: str, redis_client: redis.Redis) -> None:
    """Claims, appends, commits and heartbeats are refused with OOM; nothing is half done, nothing is lost."""
    queue = rq_queue(redis_client)
    try:
        with WorkerThread(redis_url) as worker:
            worker.engine.hold_after(2)
            ids = enqueue_many(queue, 8, max_tokens=60)
            wait_for_first_tokens(redis_client, ids)
            late = enqueue_many(queue, 8, max_tokens=5)
            redis_client.config_set("maxmemory", "1mb")
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                redis_client.set("more", 1)
            worker.engine.go_on()
            wait_until(lambda: not worker.engine.running)  # it has generated on
            assert not any(redis_client.exists(keys.result_key(job_id)) for job_id in ids)
            redis_client.config_set("maxmemory", "0")
            check_undisturbed(redis_client, [*ids, *late])
    finally:
        redis_client.config_set("maxmemory", "0")


@contextmanager
def too_few_replicas(client: redis.Redis) -> Iterator[None]:
    client.config_set("min-replicas-to-write", 1)
    yield
    client.config_set("min-replicas-to-write", 0)


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", "1mb")
    yield
    client.config_set("maxmemory", "0")


@contextmanager
def endless_script(client: redis.Redis) -> Iterator[None]:
    client.config_set("busy-reply-threshold", 50)
    with ThreadPoolExecutor() as thread:
        ended = thread.submit(client.eval, "while true do end", 0)
        wait_until(lambda: _is_busy(client))
        yield
        client.script_kill()
        with pytest.raises(redis.ResponseError):
            ended.result()


def _is_busy(client: redis.Redis) -> bool:
    try:
        return not client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")


@pytest.mark.parametrize("refusal", [too_few_replicas, endless_script])
def test_a_redis_that_refuses_everybody_is_one_that_is_away(
    refusal: Callable[[redis.Redis], AbstractContextManager[None]], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        EmbeddedRedis() as server,
        redis.Redis.from_url(server.url) as client,
        WorkerThread(server.url) as worker,
    ):
        worker.engine.hold_after(2)
        ids = enqueue_many(rq_queue(client), 4, max_tokens=60)
        wait_for_first_tokens(client, ids)
        with refusal(client):
            worker.engine.go_on()
            wait_until(lambda: not worker.engine.running)  # it has generated on
            wait_until(lambda: {"stream_redis_away", "beat_failed"} <= _actions(caplog))
        check_undisturbed(client, ids)


@pytest.mark.parametrize("refusal", [full, too_few_replicas])
def test_a_redis_that_takes_no_write_for_longer_than_a_lease_costs_no_attempt(
    refusal: Callable[[redis.Redis], AbstractContextManager[None]],
) -> None:
    """It answers to PING, and to whoever only takes something away; but no lease can be renewed."""
    settings = {"lease_seconds": SHORT_LEASE_SECONDS, "max_num_seqs": 8}
    engines = [FakeEngine(step_seconds=0.05) for _ in range(2)]
    with (
        EmbeddedRedis() as server,
        redis.Redis.from_url(server.url) as client,
        WorkerThread(server.url, engines[0], **settings),
        WorkerThread(server.url, engines[1], **settings),
    ):
        ids = enqueue_many(rq_queue(client), 16, max_tokens=150)
        wait_for_first_tokens(client, ids)
        time.sleep(SHORT_LEASE_SECONDS)  # sweepers look the other way at first
        with refusal(client):
            sleep_longer_than_a_lease()
        check_undisturbed(client, ids)
        assert sum(len(engine.submitted) for engine in engines) == 16


def _actions(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {record.getMessage().partition(" ")[0].removeprefix("action=") for record in caplog.records}


class NamedMaster:
    """A master behind an address that another one gets: as at a managed Redis, whose old connections stay open."""

    def __init__(self, old: EmbeddedRedis, new: EmbeddedRedis, proxy: CuttingProxy) -> None:
        self.old, self.new = redis.Redis.from_url(old.url), redis.Redis.from_url(new.url)
        self._ports = {self.old: urlsplit(old.url).port or 0, self.new: urlsplit(new.url).port or 0}
        self._proxy = proxy
        self.url = proxy.url
        self.old.config_set("repl-diskless-sync-delay", 0)  # else it waits five seconds for more replicas
        self.new.replicaof("127.0.0.1", self._ports[self.old])
        wait_until(lambda: self.new.info("replication")["master_link_status"] == "up")

    def fail_over(self) -> None:
        self.old.wait(1, 5000)
        self.new.replicaof("NO", "ONE")
        self._proxy.lead_to(self._ports[self.new])
        self.old.replicaof("127.0.0.1", self._ports[self.new])


@pytest.fixture
def named_master() -> Iterator[NamedMaster]:
    with (
        EmbeddedRedis() as old,
        EmbeddedRedis() as new,
        CuttingProxy(urlsplit(old.url).port or 0, seed=1) as proxy,
    ):
        master = NamedMaster(old, new, proxy)
        with master.old, master.new:
            yield master


def test_a_master_that_becomes_a_replica_is_left_by_workers_and_clients(named_master: NamedMaster) -> None:
    with WorkerThread(named_master.url) as worker, Client(named_master.url) as client:
        worker.engine.hold_after(2)
        ids = [job.id for job in client.submit_many([{"prompt": f"Job {at}", "max_tokens": 60} for at in range(4)])]
        wait_for_first_tokens(named_master.old, ids)
        named_master.fail_over()
        worker.engine.go_on()
        late = client.submit("Late", max_tokens=5)
        assert late.result(timeout=30).status == "finished"
        check_undisturbed(named_master.new, [*ids, late.id])


async def test_a_master_that_becomes_a_replica_is_left_by_the_asyncio_client(named_master: NamedMaster) -> None:
    async with AsyncClient(named_master.url) as client:
        await client.submit("Early")
        named_master.fail_over()
        late = await client.submit("Late")
        assert named_master.new.lpos("rq:queue:promptmill", late.id) == 1


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_fail_over_by_sentinel_costs_no_job_and_no_token(tmp_path: Path, has_tls: bool) -> None:
    """Workers and clients find the new master by themselves. What the old one had not replicated is sent again."""
    with (
        SentinelTrio(tmp_path, has_tls=has_tls) as trio,
        Client(trio.url) as client,
        WorkerThread(trio.url, FakeEngine(step_seconds=0.05), lease_seconds=SHORT_LEASE_SECONDS),
    ):
        jobs = client.submit_many([{"prompt": f"Job {at}", "max_tokens": 100} for at in range(8)])
        watched = jobs[0].stream(timeout=60)
        texts = [next(watched).text]
        with redis.Redis(port=trio.master.port) as master:
            wait_for_first_tokens(master, [job.id for job in jobs])
            master.wait(1, 5000)
        trio.fail_over()
        texts += [chunk.text for chunk in watched]
        results = {result.job_id: result for result in client.as_completed(jobs, timeout=60)}
        assert len(results) == 8 and {result.status for result in results.values()} == {"finished"}
        assert "".join(texts) == results[jobs[0].id].text
        with redis.Redis(port=trio.replica.port) as promoted:
            for job in jobs:
                assert stream_text(promoted, job.id) == results[job.id].text
            wait_for_no_leftovers(promoted)


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
async def test_the_asyncio_client_finds_the_master_through_sentinels(tmp_path: Path, has_tls: bool) -> None:
    with SentinelTrio(tmp_path, has_tls=has_tls) as trio, WorkerThread(trio.url):
        async with AsyncClient(trio.url) as client:
            job = await client.submit("Hello", max_tokens=3)
            text = "".join([chunk.text async for chunk in job.stream(timeout=30)])
            assert text == (await job.result(timeout=30)).text != ""


def test_jobs_that_wait_for_their_first_token_when_redis_goes_away_are_not_suspects(tmp_path: Path) -> None:
    with EmbeddedRedis(data_dir=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        engine = FakeEngine(step_seconds=0.001)
        engine.pause()
        with WorkerThread(server.url, engine, lease_seconds=SHORT_LEASE_SECONDS):
            job = rq_queue(client).enqueue(FUNCTION, prompt="Hello", max_tokens=5)
            wait_until(lambda: engine.running)
            for _ in range(2):
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    sleep_longer_than_a_lease()
                finally:
                    os.kill(server.pid, signal.SIGCONT)
            engine.go_on()
            check_undisturbed(client, [job.id])
