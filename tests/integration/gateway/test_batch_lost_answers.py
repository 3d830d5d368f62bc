"""A Redis that has lost what a batch's carrier was told, as behind a fail-over: no line stays without its answer, and
none gets two."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import redis as redis_py

from producer.gateway.batches.batch_keys import OPEN_KEY, batch_key
from producer.gateway.batches.batch_lease import AnswersLostError, BatchLease, NewPart, Order
from producer.gateway.batches.batch_record import BatchStatus, BatchUsage
from producer.gateway.files.file_records import FileRecord, Part
from tests.fakes.batches import LEASE_SECONDS, BatchBench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob

PATTERNS = ("promptmill:batch*", "promptmill:file*")


def found_keys(client: redis_py.Redis) -> Iterable[bytes]:
    return [key for pattern in PATTERNS for key in client.scan_iter(pattern)]


@pytest.mark.parametrize("step", ["finalize", "finish"])
@pytest.mark.parametrize("is_begun", [False, True])
async def test_answers_that_redis_has_lost_are_recorded_once_more_without_another_run(
    step: str,
    is_begun: bool,
    bench: BatchBench,
    low: FakeWorker,
    redis_client: redis_py.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    created = await bench.create([line("a", "one"), line("b", "fail"), line("c", "x", body={"temperature": 9})])
    lease = await bench.claim()
    assert lease is not None
    if is_begun:
        await lease.begin(model="fake", queue=low.queue, num_lines=3)
    kept = {key: redis_client.dump(key) or b"" for key in found_keys(redis_client)}
    take_step, asked = getattr(lease, step), Counter[str]()

    async def take_step_after_the_loss(*args: Any, **options: Any) -> Any:
        redis_client.delete(*found_keys(redis_client))
        for key, value in kept.items():
            redis_client.restore(key, 0, value)
        return await take_step(*args, **options)

    def count(job: HeldJob) -> None:
        asked[job.job_id] += 1
        echo(job)

    monkeypatch.setattr(lease, step, take_step_after_the_loss)
    with low.serving(count):
        with pytest.raises(AnswersLostError):
            await bench.carrier(lease).carry()
        await lease.release()
        await bench.carry()
    record = await bench.get(created.id)
    assert record.status is BatchStatus.COMPLETED
    assert (record.num_lines, record.num_completed, record.num_failed) == (3, 1, 2)
    assert set(await bench.answers(record)) == {"a", "b", "c"}
    assert list(asked.values()) == [1, 1]


async def test_nothing_is_recorded_of_a_batch_whose_beginning_redis_has_lost(
    bench: BatchBench, redis_client: redis_py.Redis
) -> None:
    """A cancel ends such a batch as one without lines."""
    created = await bench.create([line("a")])
    lease = await bench.claim()
    assert lease is not None
    kept = redis_client.dump(batch_key(created.id)) or b""
    await lease.begin(model="fake", queue="q", num_lines=1)
    redis_client.restore(batch_key(created.id), 0, kept, replace=True)
    await bench.files.reserve("part")
    file = FileRecord(id=await bench.files.new_id(), filename="o", purpose="batch_output", key_id=None)
    new = NewPart("output_file_id", file, Part("part", 1))
    with pytest.raises(AnswersLostError):
        await lease.add_answers([new], [0], num_failed=0, usage=BatchUsage())
    assert (await bench.get(created.id)).num_completed == 0


async def test_a_claim_that_redis_has_lost_is_not_taken_for_the_next_one(
    bench: BatchBench, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line("a")])
    key = batch_key(created.id)
    kept = redis_client.dump(key) or b""
    lost = await bench.claim()
    redis_client.restore(key, 0, kept, replace=True)
    redis_client.zadd(OPEN_KEY, {created.id: 0})
    held = await bench.claim()
    assert lost is not None and held is not None
    await BatchLease.renew(bench.redis, [lost, held], LEASE_SECONDS)
    assert (lost.order, held.order) == (Order.LOST, Order.GO_ON)


@pytest.mark.parametrize(("order", "then"), [(Order.LOST, Order.LOST), (Order.CANCEL, Order.GO_ON)])
async def test_an_input_whose_check_was_broken_off_for_an_order_that_redis_has_lost_is_read_again(
    order: Order, then: Order, bench: BatchBench, low: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its first lines counted as all of it."""
    created = await bench.create([line("a", "one"), line("b", "two")])
    lease = await bench.claim()
    assert lease is not None
    carrier = bench.carrier(lease)
    read_input = carrier._read_input

    def read_some(*args: Any) -> None:
        lease.order = order
        read_input(*args)
        lease.order = then

    monkeypatch.setattr(carrier, "_read_input", read_some)
    with low.serving(echo):
        await carrier.carry()
        await bench.carry()
    record = await bench.records.get(created.id)
    assert record is not None
    assert (record.status, record.num_lines, record.num_completed) == (BatchStatus.COMPLETED, 2, 2)
