"""A pool of carriers on a real Redis: what it does with batches when it is told to stop."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from producer.gateway.batches.batch_lease import BatchLease
from producer.gateway.batches.batch_record import BatchStatus
from producer.gateway.batches.carrier_pool import CarrierPool
from tests.fakes.batches import LEASE_SECONDS, BatchBench, batch_bench, line


@pytest.fixture
async def bench(redis_url: str, tmp_path: Path) -> AsyncIterator[BatchBench]:
    async with batch_bench(redis_url, tmp_path) as bench:
        yield bench


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
    async with asyncio.timeout(5):  # nobody answers the batch's line: one that went on would never end
        await pool.run(idle_seconds=60)
    monkeypatch.undo()
    assert (await bench.get(created.id)).status is not BatchStatus.COMPLETED
    lease = await bench.claim()
    assert lease is not None and lease.record.id == created.id
