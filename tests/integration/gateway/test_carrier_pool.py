"""Carriers of batches on a real Redis: a pool that is told to stop, and a process that hangs."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from producer.errors import RedisUnavailableError
from producer.gateway.batches import carrier_pool
from producer.gateway.batches.batch_lease import AnswersLostError, BatchLease
from producer.gateway.batches.batch_record import BatchStatus
from producer.gateway.batches.carrier import Carrier
from producer.gateway.batches.carrier_child import CarrierChild
from producer.gateway.batches.carrier_pool import CarrierPool
from producer.gateway.settings import GatewaySettings
from tests.fakes.batches import LEASE_SECONDS, BatchBench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.ports import free_port
from tests.fakes.waiting import WAIT_SECONDS, eventually


async def test_a_pool_told_to_stop_while_it_claims_leaves_the_batch_to_others_at_once(
    bench: BatchBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await bench.create([line("a")])
    pool = CarrierPool(bench.redis, bench.carrier, lease_seconds=LEASE_SECONDS)
    claim = BatchLease.claim

    async def claim_and_be_stopped(*arguments: object) -> BatchLease | None:
        lease = await claim(*arguments)  # type: ignore[arg-type]
        pool.stop()
        return lease

    monkeypatch.setattr(BatchLease, "claim", claim_and_be_stopped)
    async with asyncio.timeout(WAIT_SECONDS):  # nobody answers the batch's line: one that went on would never end
        await pool.run(idle_seconds=600)
    monkeypatch.undo()
    assert (await bench.get(created.id)).status is not BatchStatus.COMPLETED
    lease = await bench.claim()
    assert lease is not None and lease.record.id == created.id


@pytest.mark.parametrize("loss", [RedisUnavailableError("away for a moment"), AnswersLostError("by a fail-over")])
async def test_a_batch_goes_on_as_soon_as_redis_is_back(
    loss: Exception, bench: BatchBench, low: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await bench.create([line("a")])
    pool = CarrierPool(bench.redis, bench.carrier, lease_seconds=LEASE_SECONDS)
    carry, num_carries = Carrier.carry, 0

    async def lose_redis_first(carrier: Carrier) -> None:
        nonlocal num_carries
        num_carries += 1
        if num_carries == 1:
            raise loss
        await carry(carrier)

    monkeypatch.setattr(Carrier, "carry", lose_redis_first)
    monkeypatch.setattr(carrier_pool, "RETRY_SECONDS", 600.0)  # behind whatever else goes wrong
    with low.serving(echo):
        running = asyncio.create_task(pool.run(idle_seconds=600))
        await eventually(lambda: _has_ended(bench, created.id))
        pool.stop()
        await running
    assert (await bench.get(created.id)).status is BatchStatus.COMPLETED and num_carries == 2


async def test_a_carrier_that_hangs_is_replaced_by_its_own_gateway(
    bench: BatchBench, low: FakeWorker, redis_url: str, tmp_path: Path
) -> None:
    created = await bench.create([line("a")])
    settings = GatewaySettings(redis_url=redis_url, files=str(tmp_path), batch_lease_seconds=3.0)
    child = CarrierChild(settings, bench.records, hung_seconds=5.0)
    child.start()
    try:
        first = await eventually(lambda: _carrier_of(bench, child, created.id))
        os.kill(first, signal.SIGSTOP)
        async with asyncio.timeout(60):
            while not await bench.records.num_without_carrier():
                await asyncio.sleep(0.1)
            while (await _carrier_of(bench, child, created.id)) in (None, first):
                await asyncio.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
    finally:
        await child.aclose()


async def test_a_carrier_starts_while_the_store_is_away_and_ends_what_is_cancelled(
    bench: BatchBench, redis_url: str
) -> None:
    created = await bench.create([line("a")])
    await bench.records.cancel(created.id)
    away = f"http://127.0.0.1:{free_port()}"
    child = CarrierChild(
        GatewaySettings(redis_url=redis_url, files="s3://away/files", s3_endpoint_url=away), bench.records
    )
    child.start()
    try:
        await eventually(lambda: _has_ended(bench, created.id))
    finally:
        await child.aclose()


async def _has_ended(bench: BatchBench, batch_id: str) -> bool:
    return (await bench.get(batch_id)).status.has_ended


async def _carrier_of(bench: BatchBench, child: CarrierChild, batch_id: str) -> int | None:
    """The process's id, once it carries the batch."""
    is_carried = not await bench.records.num_without_carrier()
    in_progress = (await bench.get(batch_id)).status is BatchStatus.IN_PROGRESS
    return child._process.pid if is_carried and in_progress and child._process is not None else None
