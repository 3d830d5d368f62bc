"""A file store that is away while a batch ends early: its jobs end at once, its answers are kept until they can be
written, and whoever looks is told why the batch has not ended."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis as redis_py

from producer.batch.protocol import batch_job_id
from producer.errors import FileStoreError
from producer.gateway.batches import answer_file
from producer.gateway.batches.batch_lease import Order
from producer.gateway.batches.batch_record import BatchStatus
from tests.fakes.batches import BatchBench, batch_bench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.waiting import eventually

NUM_LINES = 5


@pytest.fixture
async def bench(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BatchBench]:
    monkeypatch.setattr(answer_file, "MIN_SECONDS_A_PART", 0.0)
    monkeypatch.setattr(answer_file, "STORE_AWAY_SECONDS", 0.01)
    async with batch_bench(redis_url, tmp_path) as bench:
        yield bench


@pytest.mark.parametrize(
    ("order", "status"), [(Order.CANCEL, BatchStatus.CANCELLED), (Order.EXPIRE, BatchStatus.EXPIRED)]
)
async def test_jobs_of_a_batch_that_ends_early_do_not_run_on_because_its_answers_cannot_be_written(
    order: Order,
    status: BatchStatus,
    bench: BatchBench,
    low: FakeWorker,
    redis_client: redis_py.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    created = await bench.create([line(f"r{number}") for number in range(NUM_LINES)])
    lease, carrying = await bench.start_carrying()
    first = await asyncio.to_thread(low.claim)
    waiting = [f"rq:job:{batch_job_id(created.id, f'r{number}')}" for number in range(1, NUM_LINES)]

    def refuse(name: str) -> None:
        raise FileStoreError("the bucket is away")

    async def problems() -> list[str]:
        errors = (await bench.get(created.id)).to_body()["errors"]
        return [problem["code"] for problem in errors["data"]] if errors else []

    async def are_cancelled() -> bool:
        return all(redis_client.hget(job, "status") == b"canceled" for job in waiting)

    with monkeypatch.context() as away:
        away.setattr(bench.store, "writer", refuse)
        echo(first)
        assert await eventually(problems) == ["file_store_error"]
        lease.give(order)
        await eventually(are_cancelled)
        assert await problems() == ["file_store_error"] and not carrying.done()
    await carrying
    record = await bench.get(created.id)
    body = record.to_body()
    assert record.unwritable_since is None
    assert (body["status"], body["errors"]) == (status, None)
    assert body["request_counts"] == {"total": NUM_LINES, "completed": 1, "failed": NUM_LINES - 1}
    assert [entry["custom_id"] for entry in await bench.read_lines(body["output_file_id"])] == ["r0"]
    missing = {entry["custom_id"] for entry in await bench.read_lines(body["error_file_id"])}
    assert missing == {f"r{number}" for number in range(1, NUM_LINES)}
