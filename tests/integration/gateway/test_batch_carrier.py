"""A carrier takes a batch from its file to its end, on a real Redis: every status, every line answered once."""

import asyncio
from pathlib import Path

import pytest
import redis as redis_py

from producer.contract import keys
from producer.gateway.api_keys import add_key, make_key
from producer.gateway.batches import batch_records
from producer.gateway.batches.batch_keys import answered_key
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from producer.gateway.files.file_keys import EVERYBODYS
from tests.fakes.batches import BatchBench, batch_bench, events_owed, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob
from tests.fakes.waiting import eventually

LOW = keys.class_queue(keys.DEFAULT_QUEUE, "low")


async def test_a_batch_is_completed_with_its_answers_its_errors_its_counts_and_its_usage(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    lines = [line("a", "one two"), line("b", "fail"), line("c", "x", body={"temperature": 9}), line("d", "three")]
    created = await bench.create(lines, metadata={"run": "7"})

    def echo_from_the_cache(job: HeldJob) -> None:
        job.num_cached_tokens = 1
        echo(job, reasoning_tokens=2)

    with low.serving(echo_from_the_cache):
        await bench.carry()
    record = await bench.get(created.id)
    assert record.status is BatchStatus.COMPLETED and record.model == "fake"
    assert (record.num_lines, record.num_completed, record.num_failed) == (4, 2, 2)
    assert (record.usage.input_tokens, record.usage.cached_tokens) == (6, 3)
    assert record.usage.output_tokens == len("one two ") + len("fail ") + len("three ")
    assert record.usage.reasoning_tokens == record.usage.to_body()["output_tokens_details"]["reasoning_tokens"] == 6
    assert record.in_progress_at and record.finalizing_at and record.completed_at and not record.failed_at
    output = await bench.read_lines(record.output_file_id)
    errors = {entry["custom_id"]: entry["response"] for entry in await bench.read_lines(record.error_file_id)}
    assert sorted((entry["custom_id"], entry["response"]["status_code"]) for entry in output) == [
        ("a", 200),
        ("d", 200),
    ]
    assert (errors["b"]["status_code"], errors["c"]["status_code"]) == (500, 400)
    assert errors["c"]["body"]["error"]["param"] == "temperature"
    assert events_owed(redis_client) == [("batch.completed", created.id)]
    files = [await bench.files.get(str(file_id)) for file_id in (record.output_file_id, record.error_file_id)]
    assert [file.status for file in files if file is not None] == ["processed", "processed"]
    assert await bench.records.count_by_status() == {**dict.fromkeys(BatchStatus, 0), BatchStatus.COMPLETED: 1}
    assert not redis_client.exists(answered_key(created.id))
    for file_id in (record.input_file_id, str(record.output_file_id), str(record.error_file_id)):
        assert await bench.files.delete(file_id) == "deleted", "nobody needs it any more"


async def test_a_line_that_is_larger_than_any_worker_takes_is_refused_before_it_is_enqueued(
    bench: BatchBench, low: FakeWorker
) -> None:
    low.announce("fake", queues=keys.class_queues(keys.DEFAULT_QUEUE), max_request_bytes=2000)
    created = await bench.create([line("a"), line("long", "x" * 3000)])
    asked: list[HeldJob] = []

    def remember(held: HeldJob) -> None:
        asked.append(held)
        echo(held)

    with low.serving(remember):
        await bench.carry()
    record = await bench.get(created.id)
    assert (record.num_completed, record.num_failed) == (1, 1) and len(asked) == 1
    [refused] = await bench.read_lines(record.error_file_id)
    error = refused["response"]["body"]["error"]
    assert (refused["custom_id"], error["code"], error["param"]) == ("long", "context_length_exceeded", "prompt")
    assert "workers of 'fake' take 2000 at most" in error["message"]


async def test_a_file_that_cannot_be_run_fails_the_batch_with_the_lines_at_fault(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line("a"), line("a"), line("b", body={"model": "other"})])
    await bench.carry()
    record = await bench.get(created.id)
    assert record.status is BatchStatus.FAILED and record.failed_at and record.output_file_id is None
    assert [(problem.line, problem.code) for problem in record.problems] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_model"),
    ]
    assert events_owed(redis_client) == [("batch.failed", created.id)]
    assert redis_client.llen(f"rq:queue:{LOW}") == 0


async def test_a_model_that_nobody_has_served_fails_the_batch_at_once(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created = await bench.create([line("a", body={"model": "fakee"})])
    await bench.carry()
    record = await bench.get(created.id)
    assert record.status is BatchStatus.FAILED and events_owed(redis_client) == [("batch.failed", created.id)]
    [problem] = record.problems
    assert (problem.code, problem.param) == ("model_not_found", "body.model")
    assert "serves 'fakee'; served are: fake" in problem.message


async def test_a_model_whose_workers_are_gone_for_long_fails_the_batch(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    low.announce("another", queues=keys.class_queues(keys.DEFAULT_QUEUE))
    created = await bench.create([line("a")])
    await bench.carry()
    waiting = (await bench.get(created.id)).to_body()
    [problem] = waiting["errors"]["data"]
    assert (waiting["status"], problem["code"], problem["param"]) == ("validating", "no_worker", "body.model")
    assert "no live worker serves 'fake': the batch waits for one" in problem["message"]
    assert await bench.claim() is None  # not at once again
    await _is_carried_again(bench, redis_client, created)
    assert (await bench.get(created.id)).status is BatchStatus.VALIDATING
    redis_client.hincrby(f"promptmill:batch:{created.id}", "unserved_since", -600)
    await _is_carried_again(bench, redis_client, created)
    [problem] = (await bench.get(created.id)).problems
    assert problem.code == "model_not_found" and "served are: another" in problem.message
    assert (await bench.get(created.id)).status is BatchStatus.FAILED


async def test_a_batch_that_no_gateway_has_a_place_for_says_so(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_records, "UNCARRIED_SECONDS", 3600)
    created = await bench.create([line("a")])
    assert (await bench.get(created.id)).to_body()["errors"] is None  # it has just been made
    redis_client.hincrby(f"promptmill:batch:{created.id}", "created_at", -3600)
    waiting = await bench.get(created.id)
    assert (await bench.records.page(whose=EVERYBODYS, after=None, limit=1)).records == [waiting]
    assert waiting.status is BatchStatus.VALIDATING
    [problem] = waiting.to_body()["errors"]["data"]
    assert problem["code"] == "no_carrier" and "turn comes when one of those has ended" in problem["message"]
    lease = await bench.claim()
    assert lease is not None and (await bench.get(created.id)).to_body()["errors"] is None
    with low.serving(echo):
        await bench.carrier(lease).carry()
    assert (await bench.get(created.id)).to_body()["errors"] is None


async def test_a_batch_whose_only_worker_is_replaced_is_completed_by_the_next(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    low.announce("another", queues=keys.class_queues(keys.DEFAULT_QUEUE))
    created = await bench.create([line("a")])
    await bench.carry()
    low.announce("another", "fake", queues=keys.class_queues(keys.DEFAULT_QUEUE))
    with low.serving(echo):
        await _is_carried_again(bench, redis_client, created)
    record = await bench.get(created.id)
    assert record.status is BatchStatus.COMPLETED and record.num_completed == 1
    assert record.to_body()["errors"] is None


async def test_a_batch_that_waits_for_its_model_does_not_read_its_input_again(
    bench: BatchBench, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    low.announce("another", queues=keys.class_queues(keys.DEFAULT_QUEUE))
    created = await bench.create([line("a")])
    await bench.carry()
    for part in await bench.files.parts(created.input_file_id):
        bench.store.delete(part.name)
    await _is_carried_again(bench, redis_client, created)
    assert (await bench.get(created.id)).unreadable_since is None


async def _is_carried_again(bench: BatchBench, redis_client: redis_py.Redis, record: BatchRecord) -> None:
    """Its time has come."""
    redis_client.zadd("promptmill:batches:open", {record.id: 0})
    await bench.carry()


async def test_output_can_be_read_while_the_batch_runs(bench: BatchBench, low: FakeWorker) -> None:
    created = await bench.create([line("a"), line("b")])
    carrying = asyncio.create_task(bench.carry())
    echo(await asyncio.to_thread(low.claim))
    record = await eventually(lambda: bench.when_completed(created, 1))
    [entry] = await bench.read_lines(record.output_file_id)
    assert record.status is BatchStatus.IN_PROGRESS and entry["response"]["status_code"] == 200
    assert await bench.files.delete(record.output_file_id) == "held"
    echo(await asyncio.to_thread(low.claim))
    await carrying
    assert len(await bench.read_lines(record.output_file_id)) == 2


async def test_jobs_go_to_the_callers_own_low_queue_answers_are_its_keys_and_lines_of_other_tenants_are_refused(
    bench: BatchBench, redis_url: str, redis_client: redis_py.Redis
) -> None:
    tenants = FakeWorker(redis_url, queue=f"{LOW}@acme")
    tenants.announce("fake", queues=keys.class_queues(keys.DEFAULT_QUEUE))
    key, _ = make_key(name="acme", tenant="acme")
    await bench.redis.run(add_key(key))
    created = await bench.create([line("a"), line("b", body={"tenant": "zeta"})], tenant="acme", key_id=key.id)
    with tenants.serving(echo):
        await bench.carry()
    tenants.close()
    record = await bench.get(created.id)
    assert record.queue == f"{LOW}@acme" and (record.num_completed, record.num_failed) == (1, 1)
    [refused] = await bench.read_lines(record.error_file_id)
    assert refused["response"]["body"]["error"]["param"] == "tenant"
    for file_id in (record.output_file_id, record.error_file_id):
        file = await bench.files.get(str(file_id))
        assert file is not None and (file.key_id, file.purpose) == (key.id, "batch_output")


async def test_no_more_jobs_are_enqueued_than_the_queue_has_room_for(
    redis_url: str, tmp_path: Path, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    async with batch_bench(redis_url, tmp_path, max_in_flight=16, max_queue_depth=5) as bench:
        created = await bench.create([line(f"r{number}") for number in range(30)])
        carrying = asyncio.create_task(bench.carry())
        seen = [await asyncio.to_thread(_depth_and_answer, redis_client, low) for _ in range(30)]
        await carrying
        assert max(seen) <= 5
        assert len(await bench.answers(await bench.get(created.id))) == 30


async def test_an_input_that_cannot_be_read_for_long_fails_the_batch(
    redis_url: str, tmp_path: Path, redis_client: redis_py.Redis
) -> None:
    async with batch_bench(redis_url, tmp_path, retry_seconds=0.0, unreadable_seconds=60.0) as bench:
        created = await bench.create([line("a")])
        for part in await bench.files.parts(created.input_file_id):
            bench.store.delete(part.name)
        await bench.carry()
        record = await bench.get(created.id)
        assert record.status is BatchStatus.VALIDATING and record.unreadable_since is not None
        redis_client.hincrby(f"promptmill:batch:{created.id}", "unreadable_since", -60)
        await bench.carry()
        record = await bench.get(created.id)
        assert record.status is BatchStatus.FAILED and record.problems[0].code == "input_file_unreadable"


async def test_output_files_expire_so_long_after_the_batchs_end(bench: BatchBench, low: FakeWorker) -> None:
    created = await bench.create([line("a")], output_expires_after=3600)
    with low.serving(echo):
        await bench.carry()
    record = await bench.get(created.id)
    file = await bench.files.get(str(record.output_file_id))
    assert file is not None and record.completed_at is not None
    assert file.expires_at is not None and 0 <= file.expires_at - record.completed_at - 3600 <= 1


def _depth_and_answer(redis_client: redis_py.Redis, worker: FakeWorker) -> int:
    job: HeldJob = worker.claim()
    depth = redis_client.llen(f"rq:queue:{LOW}")
    echo(job)
    return depth
