"""A batch that is cancelled or expires while a carrier has it, on a real Redis."""

import asyncio

import pytest
import redis as redis_py

from producer.contract import keys
from producer.gateway.batches.batch_lease import Order
from producer.gateway.batches.batch_record import BatchStatus
from tests.fakes.batches import BatchBench, events_owed, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.waiting import eventually

LOW = keys.class_queue(keys.DEFAULT_QUEUE, "low")


async def test_a_cancelled_batch_keeps_its_answers_and_says_of_the_rest_that_it_was_cancelled(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line(f"r{number}") for number in range(10)])
    lease, carrying = await bench.start_carrying()
    for _ in range(3):
        echo(await asyncio.to_thread(low.claim))
    running = await asyncio.to_thread(low.claim)
    await eventually(lambda: bench.when_completed(created, 3))
    assert await bench.records.cancel(created.id) is BatchStatus.CANCELLING
    lease.give(Order.CANCEL)
    await carrying
    record = await bench.get(created.id)
    assert record.status is BatchStatus.CANCELLED and record.cancelling_at and record.cancelled_at
    assert (record.num_completed, record.num_failed) == (3, 7)
    errors = await bench.read_lines(record.error_file_id)
    assert {entry["error"]["code"] for entry in errors} == {"batch_cancelled"}
    assert len(await bench.answers(record)) == 10
    assert running.is_cancelled() and redis_client.llen(f"rq:queue:{LOW}") == 0
    assert events_owed(redis_client) == [("batch.cancelled", created.id)]
    assert await bench.records.cancel(created.id) is BatchStatus.CANCELLED  # asked again, it is the same


async def test_an_expired_batch_keeps_its_answers_and_says_of_the_rest_that_it_expired(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line(f"r{number}") for number in range(5)])
    lease, carrying = await bench.start_carrying()
    echo(await asyncio.to_thread(low.claim))
    await eventually(lambda: bench.when_completed(created, 1))
    redis_client.hset(f"promptmill:batch:{created.id}", "expires_at", 1)
    await type(lease).renew(bench.redis, [lease], 15.0)
    assert lease.order is Order.EXPIRE
    await carrying
    record = await bench.get(created.id)
    assert record.status is BatchStatus.EXPIRED and record.expired_at and record.cancelled_at is None
    assert (record.num_completed, record.num_failed) == (1, 4)
    errors = await bench.read_lines(record.error_file_id)
    assert {entry["error"]["code"] for entry in errors} == {"batch_expired"}
    assert events_owed(redis_client) == [("batch.expired", created.id)]


async def test_a_batch_that_expires_while_its_process_is_told_to_stop_ends_as_expired(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await bench.create([line("a")])
    lease, carrying = await bench.start_carrying()
    await asyncio.to_thread(low.claim)
    reserve = bench.files.reserve

    async def stop_and_reserve(part: str) -> None:
        """For the line's error: there is no other part."""
        lease.give(Order.STOP)
        await reserve(part)

    monkeypatch.setattr(bench.files, "reserve", stop_and_reserve)
    lease.give(Order.EXPIRE)
    await carrying
    record = await bench.get(created.id)
    assert record.status is BatchStatus.EXPIRED and record.cancelled_at is None
    assert (await bench.answers(record))["a"]["error"]["code"] == "batch_expired"
