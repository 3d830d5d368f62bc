"""From a batch's end to its receiver: real gateway, carrier and Redis; OpenAI's client at both ends."""

import asyncio
import os
from pathlib import Path
from typing import Any

import openai
import redis

from tests.fakes.batches import URL, batch_bench, counts_of, jsonl, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import StartGateway, open_client
from tests.fakes.waiting import wait_until
from tests.fakes.webhook_receiver import receiving


def start_batch(client: openai.OpenAI, redis_url: str, lines: list[dict[str, Any]]) -> str:
    async def upload() -> str:
        async with batch_bench(redis_url, Path(os.environ["PROMPTMILL_FILES"])) as bench:
            return await bench.put_file(jsonl(lines))

    file_id = asyncio.run(upload())
    return client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h").id


def test_a_batch_whose_window_ended_is_told_as_expired(
    redis_url: str, redis_client: redis.Redis, start_gateway: StartGateway, low: FakeWorker
) -> None:
    gateway = start_gateway(webhook_private_targets=True)
    with open_client(gateway) as client, receiving() as receiver:
        endpoint = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.expired"])
        batch_id = start_batch(client, redis_url, [line("a"), line("b")])
        echo(low.claim())  # one of the two
        wait_until(lambda: counts_of(client, batch_id) == (1, 0))
        redis_client.hset(f"promptmill:batch:{batch_id}", "expires_at", 1)
        got = receiver.next(60)
        event: Any = client.webhooks.unwrap(got.body, got.headers, secret=endpoint.signing_secret)
        assert (event.type, event.data.id) == ("batch.expired", batch_id)
        batch = client.batches.retrieve(batch_id)
        assert batch.status == "expired" and counts_of(client, batch_id) == (1, 1)
        assert batch.output_file_id and "batch_expired" in client.files.content(str(batch.error_file_id)).text
    assert receiver.num_received == 1


def test_the_end_of_each_batch_is_told_once(redis_url: str, start_gateway: StartGateway, low: FakeWorker) -> None:
    gateway = start_gateway(webhook_private_targets=True)
    with open_client(gateway) as client, receiving() as receiver:
        endpoint = client.webhooks.create(
            name="mine",
            url=receiver.url,
            event_types=["batch.completed", "batch.failed", "batch.cancelled", "batch.expired"],
        )
        cancelled = start_batch(client, redis_url, [line("a"), line("b")])
        client.batches.cancel(cancelled)
        told = {}
        expected = {"batch.cancelled": cancelled}
        got = [receiver.next(60)]
        with low.serving(echo):
            expected["batch.completed"] = start_batch(client, redis_url, [line("a"), line("b", "fail")])
            expected["batch.failed"] = start_batch(client, redis_url, [line("a"), line("a")])
            got += [receiver.next(60), receiver.next(60)]
        for one in got:
            event: Any = client.webhooks.unwrap(one.body, one.headers, secret=endpoint.signing_secret)
            told[event.type] = event.data.id
            assert client.batches.retrieve(event.data.id).status == event.type.removeprefix("batch.")
    assert told == expected and receiver.num_received == 3
