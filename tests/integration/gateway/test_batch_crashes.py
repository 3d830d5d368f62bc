"""A carrier that dies behind any of its writes: the next one goes on, and every line is answered once, and run once."""

import asyncio
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from producer.async_transport import AsyncTransport
from producer.contract import keys
from producer.gateway.batches import answer_file
from producer.gateway.batches.batch_keys import OPEN_KEY
from producer.gateway.batches.batch_lease import BatchLease, LeaseLostError, Order
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from producer.gateway.batches.carrier import Carrier
from producer.gateway.files.file_records import FileRecords
from producer.gateway.webhooks.outbox import OUTBOX_KEY
from tests.fakes.batches import BatchBench, batch_bench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob

LOW = keys.class_queue(keys.DEFAULT_QUEUE, "low")
LINES = [line("a", "one"), line("b", "fail"), line("c", "two", body={"temperature": 9})]


class CrashedError(Exception):
    """The process is dead: nothing of it goes on, and nobody hears of it."""


class CrashingTransport(AsyncTransport):
    """Dies once Redis has carried out its `num_sends`-th exchange; the reply is never seen."""

    def __init__(self, url: str, num_sends: int) -> None:
        super().__init__(url)
        self.num_left = num_sends
        pipeline = self._redis.pipeline

        def crashing_pipeline(transaction: bool = True, shard_hint: str | None = None) -> Any:
            made: Any = pipeline(transaction, shard_hint)
            execute = made.execute

            async def execute_and_crash() -> Any:
                if self.num_left <= 0:
                    raise CrashedError
                replies = await execute()
                self.num_left -= 1
                if self.num_left == 0:
                    raise CrashedError
                return replies

            made.execute = execute_and_crash
            return made

        self._redis.pipeline = crashing_pipeline


async def carry_and_crash(bench: BatchBench, url: str, num_sends: int, order: Order = Order.GO_ON) -> bool:
    """Whether it crashed; else the batch has ended."""
    lease = await bench.claim()
    assert lease is not None
    dying = CrashingTransport(url, num_sends)
    lease = BatchLease(dying, lease.record, lease._fence)
    lease.give(order)
    carrier = Carrier(
        lease, redis=dying, files=FileRecords(dying, bench.store), store=bench.store, options=bench.options
    )
    try:
        await carrier.carry()
    except CrashedError:
        return True
    finally:
        await dying.aclose()
    return False


async def check_end(bench: BatchBench, created: BatchRecord, status: BatchStatus) -> None:
    record = await bench.get(created.id)
    assert record.status is status
    output = await bench.read_lines(record.output_file_id)
    errors = await bench.read_lines(record.error_file_id)
    assert sorted(entry["custom_id"] for entry in output + errors) == ["a", "b", "c"]
    assert (record.num_completed, record.num_failed) == (len(output), len(errors))
    tokens = [entry["response"]["body"]["usage"] for entry in output]
    if status is BatchStatus.COMPLETED:
        assert [entry["custom_id"] for entry in output] == ["a"]
        assert record.usage.output_tokens == sum(usage["completion_tokens"] for usage in tokens) + len("fail ")


@pytest.mark.timeout(240)
async def test_whatever_write_a_carrier_dies_behind_every_line_is_answered_once_and_run_once(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path, low: FakeWorker
) -> None:
    runs: Counter[str] = Counter()

    def count(job: HeldJob) -> None:
        runs[job.job_id] += 1
        echo(job)

    async with batch_bench(redis_url, tmp_path) as bench:
        num_sends, has_crashed = 0, True
        with low.serving(count):
            while has_crashed:
                num_sends += 1
                runs.clear()
                created = await bench.create(LINES)
                has_crashed = await carry_and_crash(bench, redis_url, num_sends)
                if has_crashed:
                    await bench_take_over(bench, redis_client, created)
                await check_end(bench, created, BatchStatus.COMPLETED)
                assert sorted(runs.values()) == [1, 1]
        assert num_sends > 10
        assert redis_client.llen(OUTBOX_KEY) == num_sends


@pytest.mark.timeout(240)
async def test_whatever_write_a_carrier_dies_behind_while_it_cancels_every_line_is_answered_once(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path, low: FakeWorker
) -> None:
    async with batch_bench(redis_url, tmp_path) as bench:
        num_sends, has_crashed = 0, True
        while has_crashed:
            num_sends += 1
            created = await bench.create(LINES)
            lease, carrying = await bench.start_carrying()
            echo(await asyncio.to_thread(low.claim))  # the end of `a`, which the carrier may hear of or not
            lease.give(Order.STOP)
            await carrying
            assert await bench.records.cancel(created.id) is BatchStatus.CANCELLING
            has_crashed = await carry_and_crash(bench, redis_url, num_sends, Order.CANCEL)
            if has_crashed:
                await bench_take_over(bench, redis_client, created)
            await check_end(bench, created, BatchStatus.CANCELLED)
            assert redis_client.llen(f"rq:queue:{LOW}") == 0
        assert num_sends > 8


async def bench_take_over(bench: BatchBench, redis_client: redis_py.Redis, created: BatchRecord) -> None:
    """The dead carrier's lease runs out, and another one carries the batch, unless it had ended."""
    if not redis_client.zadd(OPEN_KEY, {created.id: 0}, xx=True, ch=True):
        return
    lease = await bench.claim()
    assert lease is not None and lease.record.id == created.id
    await BatchLease.renew(bench.redis, [lease], 15.0)
    await bench.carrier(lease).carry()


async def test_a_carrier_that_was_taken_for_dead_changes_nothing_any_more(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path, low: FakeWorker
) -> None:
    async with batch_bench(redis_url, tmp_path) as bench:
        created = await bench.create(LINES)
        stale = await bench.claim()
        assert stale is not None
        sleeping = asyncio.create_task(bench.carrier(stale).carry())
        jobs = [await asyncio.to_thread(low.claim) for _ in range(2)]  # it has enqueued them, and now it is slow
        redis_client.zadd(OPEN_KEY, {created.id: 0})
        fresh = await bench.claim()
        assert fresh is not None
        for job in jobs:
            echo(job)
        await bench.carrier(fresh).carry()
        await BatchLease.renew(bench.redis, [stale], 15.0)
        assert stale.order is Order.LOST
        with suppress(Exception):
            await sleeping
        await check_end(bench, created, BatchStatus.COMPLETED)


async def test_a_carrier_that_learns_that_another_has_its_batch_cancels_no_job_of_it(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path, low: FakeWorker
) -> None:
    async with batch_bench(redis_url, tmp_path) as bench:
        created = await bench.create([line("a"), line("b")])
        stale = await bench.claim()
        assert stale is not None
        sleeping = asyncio.create_task(bench.carrier(stale).carry())
        jobs = [await asyncio.to_thread(low.claim) for _ in range(2)]
        redis_client.zadd(OPEN_KEY, {created.id: 0})
        fresh = await bench.claim()
        assert fresh is not None
        await BatchLease.renew(bench.redis, [stale], 15.0)  # as it wakes, with every line still to be answered
        with pytest.raises(LeaseLostError):
            await sleeping
        assert not any(job.is_cancelled() for job in jobs)
        for job in jobs:
            echo(job)
        await bench.carrier(fresh).carry()
        record = await bench.get(created.id)
        assert record.status is BatchStatus.COMPLETED and (record.num_completed, record.num_failed) == (2, 0)


async def test_a_part_that_was_deleted_before_it_was_written_is_written_again_and_deleted_again(
    redis_url: str, tmp_path: Path, low: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a carrier that stood still for so long that its part was taken for a dead one's."""
    monkeypatch.setattr(answer_file, "STORE_AWAY_SECONDS", 0.0)
    async with batch_bench(redis_url, tmp_path) as bench:
        created = await bench.create([line("a")])
        reserve, late = bench.files.reserve, list[str]()

        async def reserve_and_forget(part: str) -> None:
            await reserve(part)
            if not late:
                late.append(part)
                await bench.files.forget(part)

        monkeypatch.setattr(bench.files, "reserve", reserve_and_forget)
        with low.serving(echo):
            await bench.carry()
        record = await bench.get(created.id)
        assert record.num_completed == 1
        assert [entry["custom_id"] for entry in await bench.read_lines(record.output_file_id)] == ["a"]
        assert await bench.files.due_parts() == late
