"""Many coroutines wait for results at once, on a real Redis: one subscription, every outcome to whom it belongs."""

import asyncio
import json

import pytest

from producer import AsyncClient, JobFailedError, ResultTimeoutError
from producer.channel_hub import Mailbox
from producer.contract import ErrorCode, keys
from producer.outcome import Outcome
from producer.result_waiter import ResultWaiter
from producer.results import ResultCollector
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.waiting import eventually

NUM_JOBS = 60


@pytest.fixture
def deliveries(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every message that any subscription is given."""
    messages: list[bytes] = []
    put = Mailbox.put

    def note(mailbox: Mailbox, message: bytes) -> None:
        messages.append(message)
        put(mailbox, message)

    monkeypatch.setattr(Mailbox, "put", note)
    return messages


async def test_a_line_is_heard_once_however_many_wait(
    async_client: AsyncClient, worker: FakeWorker, deliveries: list[bytes]
) -> None:
    jobs = await async_client.submit_many([{"prompt": f"job {i}"} for i in range(NUM_JOBS)])
    waiting = [asyncio.create_task(job.result(timeout=60)) for job in jobs]
    await asyncio.sleep(0)  # all of them wait before the first job ends
    with worker.serving(echo):
        results = await asyncio.gather(*waiting)
    assert [result.text for result in results] == [f"job {i} " for i in range(NUM_JOBS)]
    assert len(deliveries) <= NUM_JOBS


async def test_jobs_that_end_one_after_the_other_share_a_subscription(
    async_client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.result_waiter.LINGER_SECONDS", 30.0)  # however long it takes to the next
    worker.connection.config_resetstat()
    with worker.serving(echo):
        for number in range(3):
            job = await async_client.submit(f"job {number}")
            assert (await job.result(timeout=30)).text == f"job {number} "
    assert worker.connection.info("commandstats")["cmdstat_subscribe"]["calls"] == 1


async def test_a_subscription_ends_when_nobody_has_waited_for_a_while(
    async_client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.result_waiter.LINGER_SECONDS", 0.01)
    with worker.serving(echo):
        job = await async_client.submit("one")
        await job.result(timeout=30)
        await eventually(lambda: not worker.connection.pubsub_channels())
        again = await async_client.submit("two")
        assert (await again.result(timeout=30)).text == "two "


async def test_jobs_that_ended_before_are_not_waited_for(async_client: AsyncClient, worker: FakeWorker) -> None:
    first, second = await async_client.submit_many([{"prompt": "one"}, {"prompt": "two"}])
    with worker.serving(echo):
        await first.result(timeout=30)
        await second.result(timeout=30)
    again = await asyncio.gather(first.result(timeout=20), second.result(timeout=20))
    assert [result.text for result in again] == ["one ", "two "]


async def test_a_new_queue_is_listened_to_while_others_are_waited_for(
    async_client: AsyncClient, redis_url: str
) -> None:
    slow = await async_client.submit("never", queue="promptmill")
    waits = asyncio.create_task(slow.result(timeout=30))
    await asyncio.sleep(0)
    other = await async_client.submit("x", queue="other")
    worker = FakeWorker(redis_url, queue="other")
    with worker.serving(echo):
        assert (await other.result(timeout=30)).text == "x "
    worker.close()
    assert not waits.done()
    waits.cancel()


async def test_each_waits_for_its_own_time_and_hears_of_its_own_failure(
    async_client: AsyncClient, worker: FakeWorker
) -> None:
    slow, doomed = await async_client.submit_many([{"prompt": "slow"}, {"prompt": "doomed"}])
    waits = asyncio.create_task(doomed.result(timeout=30))
    with pytest.raises(ResultTimeoutError, match=slow.id):
        await slow.result(timeout=0.05)
    held = [worker.claim() for _ in range(2)]
    for job in held:
        job.begin()
        job.end(status="failed")
    with pytest.raises(JobFailedError, match=doomed.id):
        await waits


async def test_a_lost_connection_loses_no_outcome(async_client: AsyncClient, worker: FakeWorker) -> None:
    jobs = await async_client.submit_many([{"prompt": f"job {i}"} for i in range(4)])
    waiting = [asyncio.create_task(job.result(timeout=60)) for job in jobs]
    await asyncio.sleep(0)
    with worker.serving(echo):
        for _ in range(3):
            worker.connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(0)
        assert [result.text for result in await asyncio.gather(*waiting)] == [f"job {i} " for i in range(4)]


@pytest.mark.parametrize(
    ("wrong", "why"), [({"v": 2}, "v: "), ({"job_id": "other"}, "it is job other's")], ids=["newer", "another's"]
)
async def test_a_result_that_cannot_be_read_is_that_jobs_failure_alone(
    async_client: AsyncClient, worker: FakeWorker, wrong: dict[str, object], why: str
) -> None:
    odd, sound = await async_client.submit_many([{"prompt": "odd"}, {"prompt": "sound"}])
    waits = [asyncio.create_task(job.result(timeout=20)) for job in (odd, sound)]
    await asyncio.sleep(0)
    held = worker.claim().begin()
    held.write("odd", finish_reason="stop")
    line = held.result("finished").to_wire()
    unreadable = json.dumps({**json.loads(line), **wrong})
    held.write_done("finished")
    with worker.connection.pipeline() as pipeline:
        pipeline.set(keys.result_key(held.job_id), unreadable)
        pipeline.hset(f"rq:job:{held.job_id}", "status", "finished")
        pipeline.publish(keys.results_channel(worker.queue), line)
        pipeline.execute()
    with pytest.raises(JobFailedError, match=f"not a result of job {odd.id}: {why}") as error:
        await waits[0]
    assert error.value.error.code is ErrorCode.RESULT_STORE_ERROR
    echo(worker.claim())
    assert (await waits[1]).text == "sound "
    worker.connection.delete(f"rq:job:{held.job_id}")  # the result outlives it
    assert await odd.status() == "failed" and not await odd.cancel()


async def test_a_fault_of_whoever_listens_reaches_all_who_wait(
    async_client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ResultCollector, job_id: str, outcome: Outcome) -> None:
        raise LookupError("a fault")

    looks: list[str] = []
    peek = ResultWaiter._peek

    async def noted(self: ResultWaiter, job_id: str, queue: str) -> Outcome | None:
        looks.append("begun")
        outcome = await peek(self, job_id, queue)
        looks.append("done")
        return outcome

    monkeypatch.setattr(ResultWaiter, "_peek", noted)
    jobs = await async_client.submit_many([{"prompt": "one"}, {"prompt": "two"}])
    waits = [asyncio.create_task(job.result(timeout=20)) for job in jobs]
    # Each before it listens, the second once more: what they find they need not hear.
    await eventually(lambda: looks.count("done") == 3)
    assert looks.count("begun") == 3
    monkeypatch.setattr(ResultCollector, "_end", fail)
    with worker.serving(echo):
        assert [str(error) for error in await asyncio.gather(*waits, return_exceptions=True)] == ["a fault"] * 2
