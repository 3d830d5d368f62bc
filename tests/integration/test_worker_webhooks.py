"""RQ's webhooks through our workers: owed in Redis from the commit on, delivered at least once, in nobody's way."""

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import pytest
import redis
from rq import Queue
from rq.webhook import Webhook

import worker.service
from producer.deliveries import DEAD_TTL_SECONDS, JOBS, RetryDelay
from producer.job_webhooks import GIVE_UP_SECONDS, JobWebhook, claim_job_webhooks
from producer.transport import Transport
from tests.fakes.command_line import Invoke
from tests.fakes.gateways import StartGateway
from tests.fakes.owed_deliveries import make_due, owe, owed
from tests.fakes.waiting import WAIT_SECONDS, wait_until
from tests.fakes.webhook_receiver import Received, Reply, receiving
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerProcess,
    WorkerThread,
    rq_queue,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.embedded_redis import EmbeddedRedis
from worker.fence import FencedPipeline
from worker.webhook_courier import MAX_TO_RECEIVER, NUM_THREADS, WebhookCourier

SOUND: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}
REFUSED: dict[str, Any] = {"prompt": ""}


def hook(url: str, status: Any = "finished", **fields: Any) -> Webhook:
    return Webhook(url, status, **{"method": "POST", **fields})


def enqueue(queue: Queue, *hooks: Webhook, **fields: Any) -> str:
    return str(queue.enqueue(FUNCTION, **(fields or SOUND), webhooks=list(hooks)).id)


def event(url: str) -> str:
    webhook = JobWebhook(
        job_id="x", url=url, method="GET", headers={}, timeout_seconds=5, body=None, allowed=url, written_at=time.time()
    )
    return webhook.model_dump_json()


def write(client: redis.Redis, delivery_id: str, url: str) -> None:
    for command in JobWebhook.model_validate_json(event(url)).write_commands(delivery_id):
        client.execute_command(*command)


def job_of(got: Received) -> str:
    return str(json.loads(got.body)["job_id"])


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> Callable[[RetryDelay], None]:
    """Workers that wait between attempts as a test says."""

    def set_delays(delay_after: RetryDelay) -> None:
        monkeypatch.setattr(
            worker.service, "WebhookCourier", lambda *args: WebhookCourier(*args, delay_after=delay_after)
        )

    return set_delays


def test_a_receiver_is_told_what_rq_would_tell_it_under_an_id_of_its_own(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with receiving() as receiver, WorkerThread(redis_url, webhooks=receiver.url):
        told = hook(receiver.url, headers={"authorization": "Bearer x"})
        finished = enqueue(queue, told, hook(f"{receiver.url}/more"), hook(receiver.url, "failed"))
        got = {one.path: one for one in (receiver.next(), receiver.next())}
        assert [job_of(one) for one in got.values()] == [finished, finished]
        assert json.loads(got["/hook"].body).keys() == {"job_id", "func_name", "status", "enqueued_at", "ended_at"}
        assert (got["/hook"].headers["authorization"], got["/hook"].headers["content-type"]) == (
            "Bearer x",
            "application/json",
        )
        assert got["/hook"].headers["webhook-id"] != got["/hook/more"].headers["webhook-id"]
        failed = enqueue(queue, hook(receiver.url, "failed"), **REFUSED)
        told_of = json.loads(receiver.next().body)
        assert (told_of["job_id"], told_of["status"]) == (failed, "failed") and "prompt" in told_of["exc_info"]
        wait_until(lambda: not owed(redis_client, JOBS))
        assert not list(redis_client.scan_iter("promptmill:job_webhooks:*")) and receiver.num_received == 3


def test_receivers_that_do_not_answer_hold_up_no_job_and_no_other_receiver(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    answer = threading.Event()
    with (
        receiving(lambda number: Reply(holds=answer)) as silent,
        receiving() as other,
        WorkerThread(redis_url, webhooks=f"{silent.url},{other.url}"),
    ):
        jobs = [enqueue(queue, hook(silent.url, timeout=600)) for _ in range(NUM_THREADS)]
        jobs += [enqueue(queue, hook(silent.url, "failed", timeout=600), **REFUSED) for _ in range(NUM_THREADS)]
        for job_id in jobs:
            wait_for_result(redis_client, job_id)
        wait_for_no_leftovers(redis_client)
        quick = enqueue(queue, hook(other.url))
        assert job_of(other.next()) == quick
        wait_until(lambda: silent.num_received)
        assert silent.num_received <= MAX_TO_RECEIVER  # none has been answered
        answer.set()
        assert {job_of(silent.next()) for _ in jobs} == set(jobs)


def test_a_webhook_is_sent_once_though_the_reply_to_the_commit_was_lost(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, num_commits = FencedPipeline.execute, 0

    def lose_the_first_reply(pipe: FencedPipeline, raise_on_error: bool = True) -> list[Any]:
        nonlocal num_commits
        replies = execute(pipe, raise_on_error)
        num_commits += 1
        if num_commits == 1:
            pipe._owner.error = redis.ConnectionError("the reply was lost")
            raise pipe._owner.error
        return replies

    monkeypatch.setattr(FencedPipeline, "execute", lose_the_first_reply)
    with receiving() as receiver, WorkerThread(redis_url, webhooks=receiver.url):
        for _ in range(2):
            failed = enqueue(queue, hook(receiver.url, "failed"), **REFUSED)
            assert job_of(receiver.next()) == failed
            wait_for_no_leftovers(redis_client)
        wait_until(lambda: not owed(redis_client, JOBS))
        assert receiver.num_received == num_commits == 2


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_worker_leaves_undelivered_is_delivered_by_another_under_the_same_id(
    redis_url: str, queue: Queue, redis_client: redis.Redis, end: signal.Signals
) -> None:
    """Some are under way at its end, others still wait for room."""
    answer = threading.Event()
    with receiving(lambda number: Reply(holds=answer if number <= MAX_TO_RECEIVER else None)) as receiver:
        with WorkerProcess(redis_url, webhooks=receiver.url, stop_seconds=WAIT_SECONDS) as process:
            process.wait_until_serving()
            jobs = [enqueue(queue, hook(receiver.url)) for _ in range(2 * MAX_TO_RECEIVER)]
            wait_until(lambda: len(owed(redis_client, JOBS)) == len(jobs))
            first = {
                got.headers["webhook-id"]: job_of(got) for got in (receiver.next() for _ in range(MAX_TO_RECEIVER))
            }
            process.signal(end)
            assert process.wait() == (0 if end is signal.SIGTERM else -signal.SIGKILL)
        assert len(owed(redis_client, JOBS)) == len(jobs)
        for delivery in first:
            make_due(redis_client, JOBS, delivery)  # their leases' time has passed
        with WorkerThread(redis_url, webhooks=receiver.url):
            second = {got.headers["webhook-id"]: job_of(got) for got in (receiver.next() for _ in jobs)}
            wait_until(lambda: not owed(redis_client, JOBS))
        answer.set()
    assert set(second.values()) == set(jobs) and first.items() <= second.items()


def test_what_nobody_takes_is_tried_again_then_dead_seen_counted_and_revived(
    redis_url: str,
    queue: Queue,
    redis_client: redis.Redis,
    promptmill: Invoke,
    start_gateway: StartGateway,
    delays: Callable[[RetryDelay], None],
) -> None:
    asked: list[tuple[int, float | None]] = []

    def delay_after(attempt: int, retry_after: float | None) -> float | None:
        asked.append((attempt, retry_after))
        return 0.0 if attempt < 3 else None

    delays(delay_after)
    replies = {1: Reply(503, (("retry-after", "7"),)), 2: Reply(302, (("location", "http://127.0.0.1/"),))}
    is_up = threading.Event()
    with (
        receiving(lambda number: Reply() if is_up.is_set() else replies.get(number, Reply(500))) as receiver,
        WorkerThread(redis_url, webhooks=receiver.url),
    ):
        job_id = enqueue(queue, hook(receiver.url))
        wait_until(lambda: redis_client.zcard(JOBS.dead))
        assert asked == [(1, 7.0), (2, None), (3, None)] and not owed(redis_client, JOBS)
        got = [receiver.next() for _ in range(3)]
        [delivery_id] = {one.headers["webhook-id"] for one in got}
        assert len({one.body for one in got}) == 1
        [shown] = json.loads(promptmill("webhooks", "deliveries", "--json").stdout)
        assert (shown["id"], shown["status"], shown["job_id"]) == (delivery_id, "dead", job_id)
        assert (shown["url"], shown["error"]) == (receiver.url, "answered 500")
        assert f"{delivery_id}  dead  job={job_id}  attempts=3" in promptmill("webhooks", "deliveries").stdout
        assert "Webhooks: 0 waiting, 1 dead" in promptmill("status").stdout
        assert json.loads(promptmill("status", "--json").stdout)["webhooks"] == {"waiting": 0, "dead": 1}
        gateway = start_gateway()
        assert 'promptmill_webhooks{state="dead"} 1.0' in httpx2.get(f"{gateway.url}/metrics").text
        assert httpx2.get(f"{gateway.url}/stats").json()["webhooks"] == {"waiting": 0, "dead": 1}
        is_up.set()
        assert promptmill("webhooks", "retry", delivery_id).exit_code == 0
        assert receiver.next().headers["webhook-id"] == delivery_id
        wait_until(lambda: not redis_client.exists(JOBS.receivers, JOBS.dead))
    assert "Webhooks" not in promptmill("status").stdout


def test_a_worker_leaves_others_what_it_does_not_allow_itself(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    with receiving(lambda number: Reply(500)) as first, receiving() as second:
        with WorkerThread(redis_url, webhooks=first.url):
            enqueue(queue, hook(first.url))
            first.next()
        [delivery_id] = owed(redis_client, JOBS)
        make_due(redis_client, JOBS, delivery_id, time.time())
        with WorkerThread(redis_url, webhooks=second.url):
            enqueue(queue, hook(second.url))
            second.next()
            wait_until(lambda: list(owed(redis_client, JOBS)) == [delivery_id])
        assert first.num_received == 1


@pytest.mark.parametrize("webhooks", [None, "http://127.0.0.1:9/"])
def test_what_nobody_has_taken_for_two_days_is_given_up_by_any_worker(
    redis_url: str, redis_client: redis.Redis, webhooks: str | None
) -> None:
    """Also by one that delivers none: else their bodies would lie there for ever."""
    for name in ("old", "new"):
        write(redis_client, name, "http://nobody.example/")
    make_due(redis_client, JOBS, "old", time.time() - GIVE_UP_SECONDS - 1)
    settings: dict[str, Any] = {"webhooks": webhooks} if webhooks else {}
    with WorkerThread(redis_url, **settings):
        wait_until(lambda: redis_client.zrange(JOBS.dead, 0, -1) == [b"old"])
    assert list(owed(redis_client, JOBS)) == ["new"]
    assert 0 < redis_client.ttl(f"{JOBS.prefix}old") <= DEAD_TTL_SECONDS


@pytest.mark.parametrize("room", [{"http://slow/": 0}, {"http://slow/": 1}, {}])
def test_a_backlog_keeps_no_other_receiver_waiting_and_costs_a_claim_nothing(
    redis_url: str, redis_client: redis.Redis, room: dict[str, int]
) -> None:
    with redis_client.pipeline() as pipe:
        for number in range(10_000):
            owe(pipe, JOBS, "http://slow/", f"slow-{number}")
            pipe.hset(f"{JOBS.prefix}slow-{number}", mapping={"event": event("http://slow/"), "attempts": 0})
        pipe.execute()
    write(redis_client, "fine", "http://fine/")
    redis_client.config_resetstat()
    with closing(Transport(redis_url)) as transport:
        assert [one.id for one in transport.run(claim_job_webhooks(1, {**room, "http://fine/": 8}))] == ["fine"]
    stats = redis_client.info("commandstats")
    assert sum(one["calls"] for one in stats.values()) < 30


def test_what_is_no_webhook_of_ours_is_dead_and_in_nobodys_way(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    """Anybody may have written it: another URL under the name of one that is allowed, or nothing that can be read."""
    with receiving() as receiver, receiving() as other, WorkerThread(redis_url, webhooks=receiver.url):
        fields = {"job_id": "x", "method": "GET", "headers": {}, "timeout_seconds": 5, "body": None, "written_at": 0}
        forged = json.dumps({**fields, "url": other.url, "allowed": receiver.url})
        elsewhere = json.dumps({**fields, "url": other.url, "allowed": other.url})
        no_url = json.dumps({**fields, "url": 3, "allowed": receiver.url})
        for name, event in (("forged", forged), ("elsewhere", elsewhere), ("torn", "{"), ("late", no_url)):
            redis_client.hset(f"{JOBS.prefix}{name}", mapping={"event": event, "endpoint": receiver.url, "attempts": 0})
            owe(redis_client, JOBS, receiver.url, name, time.time())
        enqueue(queue, hook(receiver.url))
        receiver.next()
        wait_until(lambda: redis_client.zcard(JOBS.dead) == 4 and not owed(redis_client, JOBS))
        assert other.num_received == 0


def test_a_redis_that_was_away_costs_no_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.webhook_courier.REDIS_AWAY_SECONDS", 0.1)
    answer = threading.Event()
    with (
        EmbeddedRedis(fsync="always") as server,
        redis.Redis.from_url(server.url) as client,
        receiving(lambda number: Reply(holds=answer if number == 1 else None)) as receiver,
        WorkerThread(server.url, webhooks=receiver.url),
    ):
        enqueue(rq_queue(client), hook(receiver.url))
        first = receiver.next().headers["webhook-id"]
        server.kill()
        answer.set()  # there is nobody to note that it was delivered, for a while
        server.start()
        second = enqueue(rq_queue(client), hook(receiver.url))
        wait_until(lambda: receiver.num_received >= 2)
        make_due(client, JOBS, first)  # its lease's time has passed
        wait_until(lambda: not owed(client, JOBS))
        got = [receiver.next() for _ in range(receiver.num_received - 1)]
        assert second in {job_of(one) for one in got}
        assert {one.headers["webhook-id"] for one in got if job_of(one) != second} <= {first}
