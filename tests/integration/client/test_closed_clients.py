"""What a client does once it was closed: nothing but say so."""

import asyncio
from collections.abc import Callable

import pytest
import redis
from rq import Queue

from producer import AsyncClient, Client, ClientClosedError, Job
from producer.contract import keys
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.waiting import WAIT_SECONDS, eventually


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, job: client.submit("b"),
        lambda client, job: client.submit_many([{"prompt": "b"}]),
        lambda client, job: client.embed("b"),
        lambda client, job: next(job.stream(timeout=5)),
        lambda client, job: next(client.as_completed([job])),
        lambda client, job: job.result(timeout=5),
        lambda client, job: job.cancel(),
        lambda client, job: client.queues(),
    ],
)
def test_a_closed_client_asks_nothing(
    redis_url: str, redis_client: redis.Redis, queue: Queue, ask: Callable[[Client, Job], object]
) -> None:
    with Client(redis_url) as client:
        job = client.submit("a")
    num_connections = connections_so_far(redis_client)
    with pytest.raises(ClientClosedError, match="was closed; make a new one"):
        ask(client, job)
    assert queue.job_ids == [job.id] and connections_so_far(redis_client) == num_connections
    client.close()


def connections_so_far(client: redis.Redis) -> int:
    """Those that others close meanwhile change nothing."""
    return int(client.info("stats")["total_connections_received"])


async def test_a_closed_asyncio_client_asks_nothing(redis_url: str, redis_client: redis.Redis, queue: Queue) -> None:
    async with AsyncClient(redis_url) as client:
        job = await client.submit("a")
    num_connections = connections_so_far(redis_client)
    for ask in (client.submit("b"), job.result(timeout=5), anext(job.stream(timeout=5))):
        with pytest.raises(ClientClosedError):
            await ask
    assert queue.job_ids == [job.id] and connections_so_far(redis_client) == num_connections
    await client.aclose()


def test_a_stream_that_is_being_read_ends_with_its_client(redis_url: str, worker: FakeWorker) -> None:
    client = Client(redis_url)
    stream = client.submit("a").stream(timeout=5)
    worker.claim().begin().write("one ")
    assert next(stream).text == "one "
    client.close()
    with pytest.raises(ClientClosedError):
        next(stream)


async def test_whoever_waits_for_a_result_hears_that_the_asyncio_client_is_closed(
    redis_url: str, redis_client: redis.Redis
) -> None:
    client = AsyncClient(redis_url)
    job = await client.submit("a")
    waiting = asyncio.create_task(job.result())
    await eventually(lambda: keys.results_channel(keys.DEFAULT_QUEUE).encode() in redis_client.pubsub_channels())
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await asyncio.wait_for(waiting, WAIT_SECONDS)
