"""The asyncio client on a real Redis: the same names, awaited, over the same protocols."""

import asyncio
import gc
from contextlib import suppress

import pytest
import redis

from producer import (
    AsyncClient,
    InvalidJobError,
    JobFailedError,
    JobStatus,
    RedisUnavailableError,
    ResultTimeoutError,
    SettingsError,
)
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.waiting import eventually


async def test_a_job_is_submitted_streamed_and_read(async_client: AsyncClient, worker: FakeWorker) -> None:
    job = await async_client.submit("one two three")
    with worker.serving(echo):
        texts = [chunk.text async for chunk in job.stream(timeout=30)]
        result = await job.result(timeout=30)
    assert texts == ["one ", "two ", "three "]
    assert result.text == "one two three "
    assert await job.status() is JobStatus.FINISHED


async def test_a_thousand_jobs_are_submitted_and_collected(async_client: AsyncClient, worker: FakeWorker) -> None:
    jobs = await async_client.submit_many([{"prompt": f"job {i}"} for i in range(600)])
    with worker.serving(echo):
        results = {result.job_id: result.text async for result in async_client.as_completed(jobs, timeout=120)}
    assert results == {job.id: f"job {i} " for i, job in enumerate(jobs)}


async def test_many_streams_share_one_loop(async_client: AsyncClient, worker: FakeWorker) -> None:
    jobs = await async_client.submit_many([{"prompt": f"a b c {i}"} for i in range(20)])

    async def read(number: int) -> str:
        return "".join([chunk.text async for chunk in jobs[number].stream(timeout=60)])

    readers = [asyncio.create_task(read(number)) for number in range(20)]
    with worker.serving(echo):
        assert await asyncio.gather(*readers) == [f"a b c {i} " for i in range(20)]


async def test_a_cut_connection_loses_and_repeats_nothing(
    async_client: AsyncClient, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = await async_client.submit("a")
    held = worker.claim().begin()
    stream = job.stream(timeout=30)
    seen = []
    for number in range(10):
        held.write(f"{number} ")
        seen.append((await anext(stream)).text)
        redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    held.end()
    seen += [chunk.text async for chunk in stream]
    assert seen == [f"{number} " for number in range(10)]


async def test_a_stream_can_be_left_and_taken_up_again(async_client: AsyncClient, worker: FakeWorker) -> None:
    job = await async_client.submit("a")
    held = worker.claim().begin()
    held.write("one ")
    held.write("two ")
    async with job.stream(timeout=30) as stream:
        async for chunk in stream:
            assert chunk.text == "one "
            break
    held.end()
    assert [chunk.text async for chunk in job.stream(after=stream.last_id)] == ["two "]


async def test_a_stream_that_is_dropped_cleans_up_after_itself(
    async_client: AsyncClient, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = await async_client.submit("a")
    worker.claim().begin().write("one ")
    async for _ in job.stream(timeout=30):
        break
    gc.collect()
    await eventually(lambda: not redis_client.pubsub_channels())


async def test_errors_are_the_same(async_client: AsyncClient, worker: FakeWorker) -> None:
    with pytest.raises(InvalidJobError, match="temperature: must be at most 2; got 3"):
        await async_client.submit("a", temperature=3)
    with pytest.raises(SettingsError, match="--redis-url"):
        AsyncClient("redis://localhost:port")
    job = await async_client.submit("fail")
    with pytest.raises(ResultTimeoutError):
        await job.result(timeout=0.05)
    with worker.serving(echo), pytest.raises(JobFailedError, match="told to fail"):
        await job.result(timeout=30)
    async with AsyncClient("redis://127.0.0.1:1") as lost:
        with pytest.raises(RedisUnavailableError, match="cannot be reached"):
            await lost.submit("a")


async def test_cancel_and_workers(async_client: AsyncClient, worker: FakeWorker) -> None:
    job = await async_client.submit("a")
    assert await job.cancel() is True
    assert [chunk.finish_reason async for chunk in async_client.job(job.id).stream(timeout=10)] == ["cancelled"]
    assert [info.models for info in await async_client.workers()] == [["fake"]]
    assert [status.name for status in await async_client.queues()] == ["promptmill"]


async def test_waiting_can_be_cancelled_by_the_event_loop(async_client: AsyncClient, worker: FakeWorker) -> None:
    job = await async_client.submit("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await job.result()
    with worker.serving(echo):
        assert (await job.result(timeout=30)).text == "a "


async def test_a_cancellation_that_a_connection_swallows_still_ends_the_call(
    async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.wait_for`, under which redis-py sends, does so before Python 3.12 if the reply has just arrived."""
    is_sending = asyncio.Event()

    async def swallow(*arguments: object) -> list[object]:
        is_sending.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return [None] * 10

    job = await async_client.submit("one")
    monkeypatch.setattr("producer.async_transport._AsyncSession._send", swallow)
    task = asyncio.create_task(job.result(timeout=30))
    await is_sending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_cancelled_can_still_cancel_the_job(async_client: AsyncClient, worker: FakeWorker) -> None:
    job = await async_client.submit("one")

    async def wait() -> None:
        try:
            await job.result(timeout=30)
        except asyncio.CancelledError:
            await job.cancel()
            raise

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await job.status() is JobStatus.CANCELLED
