"""Carriers, cancels, lapsing leases and lost replies in any order: Redis says of a batch what it should, always."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import pytest
import redis as redis_py
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from producer.gateway.batches import batch_records
from producer.gateway.batches.batch_keys import OPEN_KEY, answered_key
from producer.gateway.batches.batch_lease import AnswersLostError, BatchLease, LeaseLostError, NewPart, Order
from producer.gateway.batches.batch_record import BatchProblem, BatchStatus, BatchUsage
from producer.gateway.batches.batch_scripts import CREATE
from producer.gateway.files.file_records import FileRecord, Part
from producer.gateway.webhooks.outbox import OUTBOX_KEY
from producer.operations import Protocol
from tests.fakes.batches import BatchBench, batch_bench, line

NUM_LINES = 20

times = st.sampled_from([1, 2])  # a reply that is lost is asked for again


class BatchStates(RuleBasedStateMachine):
    """The model is what a reader of the documentation expects; `fresh` is the carrier whose lease holds."""

    url: ClassVar[str]
    folder: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.connection = redis_py.Redis.from_url(self.url)
        self.connection.flushall()
        self.status = BatchStatus.VALIDATING
        self.answered: set[int] = set()
        self.num_failed = 0
        self.is_begun = False
        self.fresh: BatchLease | None = None
        self.stale: list[BatchLease] = []

    def run(self, awaitable: Any) -> Any:
        return self.runner.run(awaitable)

    def held(self) -> BatchLease:
        assert self.fresh is not None
        return self.fresh

    @initialize()
    def create(self) -> None:
        self.bench: BatchBench = self.run(self.stack.enter_async_context(batch_bench(self.url, self.folder)))
        self.record = self.run(self.bench.create([line("a")]))

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()
        self.connection.close()

    @rule()
    def the_lease_lapses_and_another_carrier_claims(self) -> None:
        self.connection.zadd(OPEN_KEY, {self.record.id: 0}, xx=True)
        lease = self.run(self.bench.claim())
        assert (lease is None) == self.status.has_ended
        if lease is not None:
            if self.fresh is not None:
                self.stale.append(self.fresh)
            self.fresh = lease
            assert lease.record.status == self.status

    @rule()
    def nobody_claims_what_is_carried(self) -> None:
        if self.fresh is not None:
            assert self.run(self.bench.claim()) is None

    @precondition(lambda self: self.fresh is not None and self.status in ("validating", "cancelling"))
    @rule(repeat=times)
    def the_input_is_valid(self, repeat: int) -> None:
        for _ in range(repeat):
            found = self.run(self.held().begin(model="m", queue="q", num_lines=NUM_LINES))
        self.is_begun = True
        self.status = BatchStatus.CANCELLING if self.status == "cancelling" else BatchStatus.IN_PROGRESS
        assert found is self.status

    @precondition(
        lambda self: self.fresh is not None and self.is_begun and self.status in ("in_progress", "cancelling")
    )
    @rule(lines=st.sets(st.integers(0, NUM_LINES - 1), min_size=1), failed=st.integers(0, 3), repeat=times)
    def answers_are_recorded(self, lines: set[int], failed: int, repeat: int) -> None:
        self.record_answers(lines, failed, repeat)

    def record_answers(self, lines: set[int], failed: int, repeat: int) -> None:
        positions = sorted(lines - self.answered)
        if not positions:
            return
        failed = min(failed, len(positions))
        parts = [self.run(self.new_part("output_file_id", len(positions)))]
        for _ in range(repeat):
            usage = BatchUsage(input_tokens=2 * len(positions), output_tokens=len(positions))
            assert self.run(self.held().add_answers(parts, positions, num_failed=failed, usage=usage))
        self.answered.update(positions)
        self.num_failed += failed

    async def new_part(self, name: str, num_bytes: int) -> NewPart:
        part = f"{self.record.id}-{uuid4().hex}"
        await self.bench.files.reserve(part)
        file_id = await self.bench.files.new_id()
        file = FileRecord(id=file_id, filename="o.jsonl", purpose="batch_output", key_id=None, status="uploaded")
        return NewPart(name, file, Part(part, num_bytes))

    @precondition(lambda self: self.is_begun and self.status in ("in_progress", "cancelling"))
    @rule()
    def a_part_whose_time_is_up_is_not_recorded(self) -> None:
        free = sorted(set(range(NUM_LINES)) - self.answered)
        if self.fresh is not None and free:
            part = self.run(self.new_part("output_file_id", 1))
            self.connection.zadd("promptmill:files:unrecorded", {part.part.name: 1})
            assert not self.run(self.held().add_answers([part], free[:1], num_failed=0, usage=BatchUsage()))

    @rule(repeat=times)
    def a_client_cancels(self, repeat: int) -> None:
        if self.status in ("validating", "in_progress"):
            self.status = BatchStatus.CANCELLING
        for _ in range(repeat):
            assert self.run(self.bench.records.cancel(self.record.id)) is self.status

    @precondition(lambda self: self.fresh is not None and self.status in ("in_progress", "cancelling"))
    @rule(repeat=times)
    def every_line_is_answered(self, repeat: int) -> None:
        if self.status == "in_progress":
            if lines := set(range(NUM_LINES)) - self.answered:
                with pytest.raises(AnswersLostError):
                    self.run(self.held().finalize(NUM_LINES))
                self.record_answers(lines, 0, 1)
            self.status = BatchStatus.FINALIZING
        for _ in range(repeat):
            assert self.run(self.held().finalize(NUM_LINES)) is self.status

    @precondition(lambda self: self.fresh is not None and self.status in ("finalizing", "cancelling"))
    @rule(repeat=times)
    def it_ends(self, repeat: int) -> None:
        ends = {"finalizing": BatchStatus.COMPLETED, "cancelling": BatchStatus.CANCELLED}
        self.end(ends[self.status], repeat)

    @precondition(lambda self: self.fresh is not None and self.status in ("validating", "in_progress"))
    @rule(status=st.sampled_from([BatchStatus.FAILED, BatchStatus.EXPIRED]), repeat=times)
    def it_ends_early(self, status: BatchStatus, repeat: int) -> None:
        if status is BatchStatus.EXPIRED:
            self.connection.hset(f"promptmill:batch:{self.record.id}", "expires_at", 1)
            self.run(BatchLease.renew(self.bench.redis, [self.fresh], 15.0))  # type: ignore[list-item]
            assert self.fresh is not None and self.fresh.order is Order.EXPIRE
        self.end(status, repeat)

    def end(self, status: BatchStatus, repeat: int) -> None:
        assert self.fresh is not None
        problems = [BatchProblem(code="x", message="y")] if status is BatchStatus.FAILED else []
        for _ in range(repeat):
            self.run(self.fresh.finish(status, problems))
        self.status = status
        self.stale.append(self.fresh)
        self.fresh = None

    @precondition(lambda self: self.stale and not self.status.has_ended)
    @rule(data=st.data())
    def a_stale_carrier_changes_nothing(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        part = self.run(self.new_part("output_file_id", 1))
        attempts = [
            lambda: lease.begin(model="other", queue="other", num_lines=1),
            lambda: lease.add_answers([part], [0], num_failed=0, usage=BatchUsage(input_tokens=1)),
            lambda: lease.finalize(NUM_LINES),
            lambda: lease.finish(BatchStatus.FAILED),
            lambda: lease.note_unreadable(),
        ]
        with pytest.raises(LeaseLostError):
            self.run(data.draw(st.sampled_from(attempts))())
        self.run(lease.release())
        self.run(BatchLease.renew(self.bench.redis, [lease], 15.0))
        assert lease.order is Order.LOST

    @precondition(lambda self: self.status.has_ended)
    @rule(data=st.data())
    def what_was_sent_before_the_end_and_comes_behind_it_changes_nothing(self, data: st.DataObject) -> None:
        ended = self.stale[-1]
        part = self.run(self.new_part("output_file_id", 1))
        late = [
            lambda: ended.begin(model="other", queue="other", num_lines=1),
            lambda: ended.add_answers([part], [0], num_failed=0, usage=BatchUsage(input_tokens=1)),
            lambda: ended.finalize(NUM_LINES),
            lambda: ended.note_unreadable(),
        ]
        with pytest.raises(LeaseLostError):
            self.run(data.draw(st.sampled_from(late))())

    @invariant()
    def redis_says_what_it_should(self) -> None:
        if not hasattr(self, "record"):
            return
        record = self.run(self.bench.get(self.record.id))
        assert record.status is self.status
        assert (record.num_completed, record.num_failed) == (len(self.answered) - self.num_failed, self.num_failed)
        assert (record.usage.input_tokens, record.usage.output_tokens) == (2 * len(self.answered), len(self.answered))
        is_open = self.connection.zscore(OPEN_KEY, self.record.id) is not None
        assert is_open == (not self.status.has_ended)
        events = [json.loads(entry)["type"] for entry in self.connection.lrange(OUTBOX_KEY, 0, -1)]
        assert events == ([] if is_open else [f"batch.{self.status}"])
        held = self.connection.exists(f"promptmill:file:{self.record.input_file_id}:holds")
        assert bool(held) == is_open
        if is_open:
            assert self.connection.bitcount(answered_key(self.record.id)) == len(self.answered)
        else:
            assert not self.connection.exists(answered_key(self.record.id))
        if record.output_file_id is not None:
            parts = self.run(self.bench.files.parts(record.output_file_id))
            assert sum(part.num_bytes for part in parts) == len(self.answered)
        assert self.run(self.bench.records.count_by_status())[self.status] == 1


@pytest.mark.timeout(240)
def test_no_order_of_events_makes_redis_say_what_is_not_so(redis_url: str, tmp_path: Path) -> None:
    machine = type("Machine", (BatchStates,), {"url": redis_url, "folder": tmp_path})
    options = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)


async def test_a_batch_whose_input_was_not_read_in_time_expires_unless_it_is_cancelled(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path
) -> None:
    async with batch_bench(redis_url, tmp_path) as bench:
        redis_client.zadd(OPEN_KEY, {"batch_0": 0})  # of which nothing else is there
        created = await bench.create([line("a")])
        lease = await bench.claim()
        assert lease is not None and lease.record.status is BatchStatus.VALIDATING
        assert redis_client.zrange(OPEN_KEY, 0, -1) == [created.id.encode()]

        async def order() -> Order:
            await BatchLease.renew(bench.redis, [lease], 15.0)
            return lease.order

        redis_client.hset(f"promptmill:batch:{created.id}", "expires_at", 1)
        assert await order() is Order.EXPIRE
        await bench.records.cancel(created.id)
        assert await order() is Order.CANCEL, "as whoever cancelled it was told"


async def test_a_batch_whose_making_is_sent_once_more_stays_as_it_is(
    redis_url: str, redis_client: redis_py.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to the first was lost, and a carrier came in between."""

    def create_twice(keys: list[str], arguments: list[str | int]) -> Protocol[Any]:
        yield from CREATE.run(keys, arguments)
        redis_client.hset(f"promptmill:batch:{arguments[0]}", "fence", "a carrier's")
        return (yield from CREATE.run(keys, arguments))

    monkeypatch.setattr(batch_records, "CREATE", SimpleNamespace(run=create_twice))
    async with batch_bench(redis_url, tmp_path) as bench:
        created = await bench.create([line("a")])
        assert redis_client.hget(f"promptmill:batch:{created.id}", "fence") == b"a carrier's"
