"""An input file that its store loses, or cannot give, while its batch runs: what becomes of the batch, and what its
maker is told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis as redis_py

from producer.batch.protocol import batch_job_id
from producer.gateway.batches.batch_lease import Order
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from tests.fakes.batches import BatchBench, batch_bench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.waiting import eventually

NUM_LINES = 5

End = Callable[[BatchBench, redis_py.Redis, str], Awaitable[None]]


@pytest.fixture
async def bench(redis_url: str, tmp_path: Path) -> AsyncIterator[BatchBench]:
    """An input that cannot be read fails its batch after a minute; until then it is tried again and again."""
    async with batch_bench(redis_url, tmp_path, retry_seconds=0.0, unreadable_seconds=60.0) as bench:
        yield bench


async def begin(bench: BatchBench, low: FakeWorker) -> tuple[BatchRecord, "asyncio.Task[None]"]:
    """A batch with one of its lines answered, and its carrier."""
    created = await bench.create([line(f"r{number}") for number in range(NUM_LINES)])
    carrying = asyncio.create_task(bench.carry())
    echo(await asyncio.to_thread(low.claim))

    async def is_answered() -> bool:
        return (await bench.get(created.id)).num_completed == 1

    await eventually(is_answered)
    return created, carrying


async def lose_input(bench: BatchBench, record: BatchRecord) -> list[tuple[str, bytes]]:
    lost = []
    for part in await bench.files.parts(record.input_file_id):
        lost.append((part.name, b"".join(bench.store.read(part.name))))
        bench.store.delete(part.name)
    return lost


def restore_input(bench: BatchBench, parts: list[tuple[str, bytes]]) -> None:
    for name, data in parts:
        with bench.store.writer(name) as writer:
            writer.write(data)


async def kill(carrying: "asyncio.Task[None]", redis_client: redis_py.Redis, batch_id: str) -> None:
    """The carrier, and its lease."""
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)
    redis_client.zadd("promptmill:batches:open", {batch_id: 0})


async def test_a_carrier_needs_the_input_no_more_once_it_has_begun(bench: BatchBench, low: FakeWorker) -> None:
    created, carrying = await begin(bench, low)
    await lose_input(bench, created)
    with low.serving(echo):
        await carrying
    record = await bench.get(created.id)
    assert (record.status, record.num_completed, record.problems) == (BatchStatus.COMPLETED, NUM_LINES, [])


async def test_without_its_input_and_its_carrier_a_batch_fails_with_the_answers_it_has_and_says_how_many(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created, carrying = await begin(bench, low)
    await lose_input(bench, created)
    await kill(carrying, redis_client, created.id)
    await bench.carry()
    waiting = (await bench.get(created.id)).to_body()
    assert waiting["status"] == "in_progress"  # the store may come back
    assert "is tried again" in waiting["errors"]["data"][0]["message"]
    redis_client.hincrby(f"promptmill:batch:{created.id}", "unreadable_since", -60)
    await bench.carry()
    body = (await bench.get(created.id)).to_body()
    assert body["status"] == "failed"
    assert body["request_counts"] == {"total": NUM_LINES, "completed": 1, "failed": 0}
    [problem] = body["errors"]["data"]
    assert (problem["code"], problem["param"]) == ("input_file_unreadable", "input_file_id")
    assert "1 of its 5 requests were answered" in problem["message"] and created.input_file_id in problem["message"]
    assert [entry["custom_id"] for entry in await bench.read_lines(body["output_file_id"])] == ["r0"]
    output = await bench.files.get(body["output_file_id"])
    assert output is not None and output.status == "processed"


async def cancel(bench: BatchBench, redis_client: redis_py.Redis, batch_id: str) -> None:
    await bench.records.cancel(batch_id)


async def expire(bench: BatchBench, redis_client: redis_py.Redis, batch_id: str) -> None:
    redis_client.hset(f"promptmill:batch:{batch_id}", "expires_at", 1)


EARLY_ENDS = pytest.mark.parametrize(
    ("end", "status", "code"),
    [(cancel, BatchStatus.CANCELLED, "batch_cancelled"), (expire, BatchStatus.EXPIRED, "batch_expired")],
)


@EARLY_ENDS
async def test_a_batch_that_ends_while_its_store_is_away_and_its_carrier_dead_keeps_its_answers_and_ends_its_jobs(
    end: End, status: BatchStatus, code: str, bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created, carrying = await begin(bench, low)
    parts = await lose_input(bench, created)
    await kill(carrying, redis_client, created.id)
    echo(await asyncio.to_thread(low.claim))  # nobody has heard of it yet
    await end(bench, redis_client, created.id)
    await bench.carry()
    assert not (await bench.get(created.id)).status.has_ended
    restore_input(bench, parts)
    await bench.carry()
    record = await bench.get(created.id)
    assert (record.status, record.num_completed, record.num_failed) == (status, 2, NUM_LINES - 2)
    assert {entry["custom_id"] for entry in await bench.read_lines(record.output_file_id)} == {"r0", "r1"}
    assert {entry["error"]["code"] for entry in await bench.read_lines(record.error_file_id)} == {code}
    waiting = [f"rq:job:{batch_job_id(created.id, f'r{number}')}" for number in range(2, NUM_LINES)]
    assert {redis_client.hget(job, "status") for job in waiting} == {b"canceled"}


@EARLY_ENDS
async def test_a_batch_that_ends_without_its_input_says_why_lines_are_missing(
    end: End, status: BatchStatus, code: str, bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created, carrying = await begin(bench, low)
    await lose_input(bench, created)
    await kill(carrying, redis_client, created.id)
    await end(bench, redis_client, created.id)
    await bench.carry()
    redis_client.hincrby(f"promptmill:batch:{created.id}", "unreadable_since", -60)
    await bench.carry()
    record = await bench.get(created.id)
    assert record.status is status and "1 of its 5 requests" in record.problems[0].message


async def test_a_batch_that_is_cancelled_before_its_input_could_be_read_ends_at_once(
    bench: BatchBench, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line("a")])
    await lose_input(bench, created)
    lease, carrying = await bench.start_carrying()
    lease.give(Order.CANCEL)
    await carrying
    assert (await bench.get(created.id)).status is BatchStatus.CANCELLED


async def test_an_outage_of_the_store_that_is_over_does_not_count_towards_the_next(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created, carrying = await begin(bench, low)
    parts = await lose_input(bench, created)
    await kill(carrying, redis_client, created.id)
    await bench.carry()
    redis_client.hincrby(f"promptmill:batch:{created.id}", "unreadable_since", -60)
    restore_input(bench, parts)
    with low.serving(echo):
        await bench.carry()
    record = await bench.get(created.id)
    assert (record.status, record.num_completed) == (BatchStatus.COMPLETED, NUM_LINES)
    assert record.unreadable_since is None
