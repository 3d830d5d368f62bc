"""Jobs that are submitted once, whoever asks how often: idempotency keys, dependencies, and writes that are safe."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.registry import DeferredJobRegistry

from producer import AsyncClient, Client, DurabilityError, ErrorCode, InvalidJobError, JobStatus, durability
from producer.contract import keys
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, rq_queue, wait_for_no_leftovers
from worker.embedded_redis import EmbeddedRedis

SUBMIT = """
import sys
from producer import Client
with Client(sys.argv[1]) as client:
    sys.stdin.readline()
    for number in range(50):
        print(client.submit("Hello", max_tokens=3, idempotency_key=f"order {number}").id)
"""


def queued(connection: redis.Redis, queue: str = keys.DEFAULT_QUEUE) -> list[str]:
    return list(rq_queue(connection, queue).get_job_ids())


def test_a_key_names_one_job_also_when_it_has_finished(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    first = client.submit("Hello", max_tokens=3, idempotency_key="order 7")
    assert client.submit("Hello", max_tokens=3, idempotency_key="order 7").id == first.id
    assert queued(redis_client) == [first.id]
    with WorkerThread(redis_url):
        result = first.result(timeout=20)
        again = client.submit("Hello", max_tokens=3, idempotency_key="order 7", priority_class="high")
        assert again.id == first.id and again.queue == first.queue and again.result(timeout=20) == result
        assert result.attempts == 1 and redis_client.xlen(keys.results_channel(keys.DEFAULT_QUEUE)) == 1


@pytest.mark.parametrize("name", ["job_id", "idempotency_key"])
def test_a_job_is_found_again_while_no_worker_serves_its_model(
    client: Client, redis_url: str, redis_client: redis.Redis, name: str
) -> None:
    asked: Any = {"model": "fake", "tenant": "acme", name: "order-7"}
    with FakeWorker(redis_url, queue="promptmill@acme") as worker:
        worker.announce("fake", queues=["promptmill"])
        first = client.submit("Hello", **asked)
        with worker.serving(echo):
            first.result(timeout=20)
        worker.announce("another", queues=["promptmill"])
    with Client(redis_url) as other:  # which has not seen the worker that is gone
        again = other.submit("Hello", **asked)
        assert (again.id, again.queue) == (first.id, first.queue) and again.result(timeout=20).text == "Hello "
        with pytest.raises(InvalidJobError, match="no live worker serves 'fake'"):
            other.submit("Hello", **{**asked, name: "order-8"})
    assert queued(redis_client, "promptmill@acme") == []


async def test_both_clients_make_the_same_job_of_a_key(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    job = client.submit("Hello", max_tokens=3, idempotency_key="order 7")
    async with AsyncClient(redis_url) as other:
        assert (await other.submit("Hello", max_tokens=3, idempotency_key="order 7")).id == job.id
        with pytest.raises(InvalidJobError) as caught:
            await other.submit("Bye", max_tokens=3, idempotency_key="order 7")
    assert caught.value.code is ErrorCode.IDEMPOTENCY_CONFLICT and queued(redis_client) == [job.id]


def test_another_body_under_the_same_key_is_refused(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("Hello", max_tokens=3, idempotency_key="order 7")
    with pytest.raises(InvalidJobError, match="was used for another request") as caught:
        client.submit("Hello", max_tokens=4, idempotency_key="order 7")
    assert caught.value.code is ErrorCode.IDEMPOTENCY_CONFLICT and caught.value.code.http_status == 409
    assert caught.value.param == "idempotency_key" and queued(redis_client) == [job.id]


def test_a_key_is_its_tenants_own(client: Client) -> None:
    jobs = [
        client.submit("Hello", tenant=tenant, idempotency_key="order 7", max_tokens=number)
        for number, tenant in enumerate((None, "acme", "zeta"), start=1)
    ]
    assert len({job.id for job in jobs}) == 3
    assert client.submit("Hello", queue="promptmill@acme", idempotency_key="order 7", max_tokens=2).id == jobs[1].id


def test_a_key_and_an_id_do_not_go_together(client: Client) -> None:
    with pytest.raises(InvalidJobError, match="leave out job_id"):
        client.submit("Hello", idempotency_key="a", job_id="b")


def test_two_processes_at_once_make_one_job_of_each_key(redis_url: str, redis_client: redis.Redis) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SUBMIT, redis_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=60)[0].split() for process in processes)
    assert first == second and len(set(first)) == 50
    assert sorted(queued(redis_client)) == sorted(first)


def test_lost_replies_enqueue_a_key_once(redis_url: str, redis_client: redis.Redis) -> None:
    port = redis_client.connection_pool.connection_kwargs["port"]
    with CuttingProxy(port, seed=5) as proxy, Client(proxy.url) as client:
        proxy.probability = 0.12
        jobs = [client.submit("Hello", max_tokens=3, idempotency_key=f"order {number}") for number in range(20)]
        assert proxy.num_cuts > 2
    assert sorted(queued(redis_client)) == sorted(job.id for job in jobs)


def test_many_requests_with_one_bad_key_enqueue_nothing(client: Client, redis_client: redis.Redis) -> None:
    client.submit("Hello", idempotency_key="a", job_id=None, queue="other")
    with pytest.raises(InvalidJobError) as caught:
        client.submit_many([{"prompt": "One"}, {"prompt": "Bye", "idempotency_key": "a"}])
    assert caught.value.index == 1 and caught.value.code is ErrorCode.IDEMPOTENCY_CONFLICT
    with pytest.raises(InvalidJobError):
        client.submit_many([{"prompt": text, "idempotency_key": "b"} for text in ("One", "Two")])
    assert queued(redis_client) == []
    same = client.submit_many([{"prompt": "One", "idempotency_key": "b"}] * 2)
    assert same[0].id == same[1].id and queued(redis_client) == [same[0].id]


def test_a_job_waits_for_those_it_depends_on(client: Client, redis_url: str, redis_client: redis.Redis) -> None:
    first = [client.submit(f"Job {at}", max_tokens=3, tenant="acme") for at in range(2)]
    options = {"depends_on": [first[0], first[1].id], "idempotency_key": "report", "max_tokens": 3}
    last = client.submit("Report", tenant="zeta", **options)  # type: ignore[arg-type]
    assert client.submit("Report", tenant="zeta", **options).id == last.id  # type: ignore[arg-type]
    assert last.status() is JobStatus.WAITING and queued(redis_client, "promptmill@zeta") == []
    assert DeferredJobRegistry("promptmill@zeta", connection=redis_client).get_job_ids() == [last.id]
    with WorkerThread(redis_url) as worker:
        assert last.result(timeout=20).status == "finished"
        assert [request.split(":")[0] for request in worker.engine.submitted][-1] == last.id
        wait_for_no_leftovers(redis_client)
        wait_until(lambda: not redis_client.keys("rq:deferred:*"))
        late = client.submit("Late", depends_on=last, max_tokens=3)  # nothing to wait for any more
        assert late.result(timeout=20).status == "finished"


def test_a_job_does_not_run_before_the_last_of_those_it_depends_on(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    one, other = client.submit("One", max_tokens=3), client.submit("Other", max_tokens=3, queue="nobody-serves-it")
    last = client.submit("Last", depends_on=[one, other])
    with WorkerThread(redis_url):
        assert one.result(timeout=20).status == "finished"
        wait_for_no_leftovers(redis_client)
    assert last.status() is JobStatus.WAITING and queued(redis_client) == []


def test_a_dependency_that_nobody_knows_or_that_was_cancelled_is_refused(
    client: Client, redis_client: redis.Redis
) -> None:
    with pytest.raises(InvalidJobError, match="gone does not exist") as caught:
        client.submit("Hello", depends_on="gone")
    assert caught.value.param == "depends_on" and not redis_client.keys("rq:job:*")
    cancelled = client.submit("Hello")
    cancelled.cancel()
    with pytest.raises(InvalidJobError, match="cancelled; leave it out"):
        client.submit("Hello", depends_on=[cancelled])


def test_a_durable_job_is_on_disk_when_submit_returns(client: Client, redis_client: redis.Redis) -> None:
    redis_client.config_set("appendfsync", "everysec")
    job = client.submit("Hello", durable=True, idempotency_key="a")
    again = client.submit("Hello", durable=True, idempotency_key="a")
    jobs = client.submit_many([{"prompt": "One"}, {"prompt": "Two"}], durable=True)
    assert queued(redis_client) == [job.id, *(other.id for other in jobs)] and again.id == job.id
    assert redis_client.info("persistence")["aof_pending_bio_fsync"] == 0


def test_a_job_is_durable_once_a_replica_has_it_whoever_asks_for_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, replica = (EmbeddedRedis(data_dir=tmp_path / name) for name in ("master", "replica"))
    with master, replica, redis.Redis(port=replica.port) as connection:
        with Client(master.url) as client, redis.Redis(port=master.port) as first:
            first.config_set("repl-diskless-sync-delay", 0)  # else it waits for other replicas to come
            connection.replicaof("127.0.0.1", str(master.port))
            wait_until(lambda: connection.info("replication")["master_link_status"] == "up")
            client.submit("Hello", job_id="before", durable=True)
            os.kill(replica.pid, signal.SIGSTOP)
            try:
                monkeypatch.setattr(durability, "CONFIRM_MS", 100)
                for _ in range(2):  # whether it is new, or known, and this connection has written nothing of it
                    with Client(master.url) as other, pytest.raises(DurabilityError, match="on a replica"):
                        other.submit("Hello", job_id="after", durable=True)
            finally:
                os.kill(replica.pid, signal.SIGCONT)
            monkeypatch.undo()
            assert client.submit("Hello", job_id="after", durable=True).id == "after"
        assert connection.exists("rq:job:after")


def test_a_redis_without_an_append_only_file_promises_nothing() -> None:
    with EmbeddedRedis() as server, Client(server.url) as client, redis.Redis.from_url(server.url) as connection:
        connection.config_set("appendonly", "no")
        with pytest.raises(DurabilityError, match="appendonly yes"):
            client.submit("Hello", durable=True)
        assert queued(connection) == []


def test_a_redis_that_cannot_wait_for_its_disk_promises_nothing(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "ON_DISK", "WAITAOF-OF-7.2")  # no server knows it
    with pytest.raises(DurabilityError, match=r"since 7\.2"):
        client.submit("Hello", durable=True)
    assert queued(redis_client) == []


def test_a_job_waits_for_all_that_it_depends_on_in_whatever_order_they_finish(
    client: Client, redis_client: redis.Redis
) -> None:
    finished, waiting = (client.submit("Hello") for _ in range(2))
    redis_client.hset(f"rq:job:{finished.id}", "status", "finished")
    for both in ([finished, waiting], [waiting, finished]):
        job = client.submit("Hello", depends_on=both)
        assert redis_client.hget(f"rq:job:{job.id}", "status") == b"deferred"
