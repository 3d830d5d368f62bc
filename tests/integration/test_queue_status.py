"""What queues and workers say of themselves: how long the oldest job has been waiting, when a worker was last alive."""

import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from redis.typing import FieldT

from producer import Client
from producer.operations import Protocol, Send, T
from producer.queues import read_queues
from producer.transport import Transport
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def oldest(client: Client) -> float | None:
    [queue] = client.queues()
    return queue.oldest_seconds


def test_a_queue_says_how_long_its_next_job_has_been_waiting(redis_url: str, redis_client: redis.Redis) -> None:
    with Client(redis_url) as client:
        assert oldest(client) is None
        first, _ = client.submit("a"), client.submit("b")
        redis_client.hset(f"rq:job:{first.id}", "enqueued_at", ago(60))
        assert oldest(client) == pytest.approx(60, abs=5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"created_at": 30}, 30),
        ({"created_at": 30, "enqueued_at": "yesterday"}, 30),
        ({"enqueued_at": -900}, 0),
        ({"enqueued_at": ""}, None),
        ({"enqueued_at": b"\xff"}, None),
        ({}, None),
    ],
)
def test_what_another_producer_wrote_is_read_as_far_as_it_goes(
    redis_url: str, redis_client: redis.Redis, fields: dict[FieldT, Any], expected: float | None
) -> None:
    """Numbers are seconds ago."""
    redis_client.sadd("rq:queues", "rq:queue:promptmill")
    redis_client.rpush("rq:queue:promptmill", "raw")
    times: dict[FieldT, Any] = {name: ago(value) if isinstance(value, int) else value for name, value in fields.items()}
    redis_client.hset("rq:job:raw", mapping={"status": "queued", **times})
    with Client(redis_url) as client:
        assert oldest(client) == (None if expected is None else pytest.approx(expected, abs=5))


@pytest.mark.parametrize("job_id", [b"\xff", b"a-list"])
def test_a_queue_is_counted_whatever_lies_at_its_head(redis_url: str, redis_client: redis.Redis, job_id: bytes) -> None:
    redis_client.sadd("rq:queues", "rq:queue:promptmill", b"rq:queue:\xff")
    redis_client.rpush("rq:queue:promptmill", job_id)
    redis_client.rpush("rq:job:a-list", "no hash")
    with Client(redis_url) as client:
        [queue] = client.queues()
    assert (queue.depth, queue.oldest_seconds) == (1, None)


def test_a_worker_says_when_it_was_last_alive(redis_url: str) -> None:
    with WorkerThread(redis_url), Client(redis_url) as client:
        [worker] = wait_until(client.workers)
        assert worker.beat_at == pytest.approx(time.time(), abs=5)


def test_tenants_that_have_no_job_cost_hardly_a_command(redis_url: str, redis_client: redis.Redis) -> None:
    redis_client.sadd("rq:queues", *(f"rq:queue:promptmill@{number}" for number in range(3000)))
    redis_client.rpush("rq:queue:promptmill@7", "waits")
    redis_client.zadd("rq:failed:promptmill@2999", {"failed": time.time()})
    sizes: list[int] = []
    with closing(Transport(redis_url)) as transport:
        queues = {queue.name: queue for queue in transport.run(counting(read_queues("promptmill"), sizes))}
    assert {"promptmill@7", "promptmill@2999", "promptmill"} <= queues.keys() and len(queues) < 10
    assert (queues["promptmill@7"].depth, queues["promptmill@2999"].registries["failed"]) == (1, 1)
    assert max(sizes) <= 3 and sum(sizes) < 30


def counting(protocol: Protocol[T], sizes: list[int]) -> Protocol[T]:
    """Notes how many commands go in each round trip."""
    reply: Any = None
    while True:
        try:
            operation = protocol.send(reply)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if isinstance(operation, Send):
            sizes.append(len(operation.commands))
        reply = yield operation
