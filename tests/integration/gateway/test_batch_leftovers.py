"""The lines of a batch that is over before they were answered: their jobs, whichever these are, end with it."""

import pytest
import redis as redis_py

from producer import AsyncClient
from producer.async_transport import AsyncTransport
from producer.batch.lines import BatchLine
from producer.batch.protocol import Answer, batch_job_id
from producer.contract import keys
from producer.gateway.batches.leftovers import Leftovers
from tests.fakes.fake_worker import FakeWorker, echo

BATCH = "batch_1"


def line_of(custom_id: str) -> BatchLine:
    return BatchLine(custom_id, "/v1/completions", {"prompt": custom_id})


async def settle(redis_url: str, *custom_ids: str) -> dict[str, Answer]:
    entries = enumerate(map(line_of, custom_ids), start=1)
    leftovers = Leftovers(BATCH, "batch_cancelled", "the batch was cancelled")
    redis = AsyncTransport(redis_url)
    try:
        answers = [answer async for some in redis.iterate(leftovers.settle(entries)) for answer in some]
    finally:
        await redis.aclose()
    assert [answer.number for answer in answers] == list(range(1, len(custom_ids) + 1))
    return dict(zip(custom_ids, answers, strict=True))


@pytest.mark.parametrize("run", [0, 1, 10])
async def test_every_job_of_a_line_is_cancelled_whether_it_is_its_first_or_a_later_one(
    redis_url: str, redis_client: redis_py.Redis, worker: FakeWorker, run: int
) -> None:
    async with AsyncClient(redis_url) as client:
        await client.submit("ended", job_id=batch_job_id(BATCH, "ended", run))
        echo(worker.claim())
        await client.submit("runs", job_id=batch_job_id(BATCH, "runs", run))
        running = worker.claim()
        waiting = await client.submit("waits", job_id=batch_job_id(BATCH, "waits", run))
        answers = await settle(redis_url, "ended", "runs", "waits", "never enqueued")
        assert running.is_cancelled() and await waiting.status() == "cancelled"
    assert redis_client.llen(f"rq:queue:{worker.queue}") == 0
    assert answers["ended"].line["response"]["body"]["choices"][0]["text"] == "ended "
    assert [name for name, answer in answers.items() if answer.is_failed] == ["runs", "waits", "never enqueued"]
    assert answers["runs"].line["error"]["code"] == "batch_cancelled"


async def test_a_line_with_several_jobs_is_answered_by_the_one_that_ended(redis_url: str, worker: FakeWorker) -> None:
    """As where a line's job was forgotten, a second one ended, and another carrier began with the first again."""
    async with AsyncClient(redis_url) as client:
        await client.submit("twice", job_id=batch_job_id(BATCH, "twice", 1))
        echo(worker.claim())
        first = await client.submit("twice", job_id=batch_job_id(BATCH, "twice", 0))
        answers = await settle(redis_url, "twice")
        assert not answers["twice"].is_failed and await first.status() == "cancelled"


async def test_a_line_whose_result_cannot_be_read_is_answered_with_that_and_the_others_with_theirs(
    redis_url: str, redis_client: redis_py.Redis, worker: FakeWorker
) -> None:
    async with AsyncClient(redis_url) as client:
        for custom_id in ("odd", "sound"):
            await client.submit(custom_id, job_id=batch_job_id(BATCH, custom_id))
            echo(worker.claim())
    redis_client.set(keys.result_key(batch_job_id(BATCH, "odd")), '{"v": 2}')
    answers = await settle(redis_url, "odd", "sound")
    assert answers["odd"].line["response"]["body"]["error"]["code"] == "result_store_error"
    assert answers["sound"].line["response"]["body"]["choices"][0]["text"] == "sound "
