"""Webhooks from the outbox in a real Redis to a real receiver, checked by OpenAI's client, unmodified."""

import json
import threading
import time

import openai
import pytest
import redis
from openai.types.webhooks import BatchCompletedWebhookEvent

from producer.async_transport import AsyncTransport
from producer.deliveries import (
    BATCHES,
    DEAD_TTL_SECONDS,
    RETRY_DELAYS,
    WebhookCounts,
    count_deliveries,
    list_deliveries,
    retry_delay,
    revive_deliveries,
    settle_delivery,
)
from producer.gateway.webhooks.deliveries import MAX_TO_ENDPOINT, claim_deliveries
from producer.gateway.webhooks.dispatcher import MAX_CONCURRENT
from producer.gateway.webhooks.endpoints import (
    DISABLED_KEY,
    WebhookEndpoint,
    add_endpoint,
    disable_endpoint,
    remove_endpoint,
    replace_endpoint,
)
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from tests.fakes.owed_deliveries import owe
from tests.fakes.waiting import eventually
from tests.fakes.webhook_dispatching import add, dispatching, next_of, tell
from tests.fakes.webhook_receiver import Received, Reply, receiving

Redis = redis.Redis


def unwrap(got: Received, secret: str) -> BatchCompletedWebhookEvent:
    event = openai.OpenAI(api_key="none").webhooks.unwrap(got.body, got.headers, secret=secret)
    assert isinstance(event, BatchCompletedWebhookEvent)
    return event


async def test_openais_client_accepts_what_a_receiver_got(transport: AsyncTransport, redis_client: Redis) -> None:
    with receiving() as receiver:
        endpoint = await add(transport, receiver.url)
        event = await tell(transport, "batch_1")
        async with dispatching(transport):
            got = await next_of(receiver)
            await eventually(lambda: not redis_client.exists(BATCHES.receivers, OUTBOX_KEY, f"{BATCHES.prefix}*"))
    accepted = unwrap(got, endpoint.secret)
    assert (accepted.id, accepted.data.id, accepted.created_at) == (event.id, "batch_1", 1_700_000_000)
    assert got.headers["webhook-id"] == event.id
    assert got.headers["content-type"] == "application/json"
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.path == "/hook"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(got, WebhookEndpoint.create(name="x", url="x", key_id=None).secret)
    assert not list(redis_client.scan_iter(BATCHES.prefix + "*"))


async def test_a_receiver_that_does_not_answer_leaves_room_for_others(transport: AsyncTransport) -> None:
    answer = threading.Event()
    with receiving(lambda number: Reply(holds=answer)) as silent, receiving() as other:
        await add(transport, silent.url, key_id="silent")
        await add(transport, other.url, key_id="other")
        for number in range(2 * MAX_CONCURRENT):
            await tell(transport, f"batch_{number}", key_id="silent")
        async with dispatching(transport):
            await eventually(lambda: silent.num_received == MAX_TO_ENDPOINT)
            for number in range(2 * MAX_TO_ENDPOINT):
                await tell(transport, f"batch_{number}", key_id="other")
            for _ in range(2 * MAX_TO_ENDPOINT):
                await next_of(other)
            assert silent.num_received == MAX_TO_ENDPOINT  # none was answered
            answer.set()
            await eventually(lambda: silent.num_received == 2 * MAX_CONCURRENT)


async def test_both_secrets_sign_while_an_old_one_is_kept(transport: AsyncTransport) -> None:
    with receiving() as receiver:
        old = WebhookEndpoint.create(name="test", url=receiver.url, key_id=None)
        new = old.rotated(keeps_old=True)
        await transport.run(add_endpoint(new))
        await tell(transport, "batch_1")
        async with dispatching(transport):
            got = await next_of(receiver)
    assert unwrap(got, old.secret) == unwrap(got, new.secret)
    assert old.secret != new.secret
    assert new.rotated(keeps_old=False).valid_secrets() != new.valid_secrets()
    assert len(new.rotated(keeps_old=False).valid_secrets()) == 1


def test_an_old_secret_signs_for_a_day_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    old = WebhookEndpoint.create(name="test", url="x", key_id=None)
    new = old.rotated(keeps_old=True)
    rotated_at = time.time()
    for hours, secrets in ((23, [new.secret, old.secret]), (25, [new.secret])):
        with monkeypatch.context() as later:
            later.setattr(time, "time", lambda: rotated_at + hours * 3600)  # noqa: B023
            assert new.valid_secrets() == secrets


async def test_each_endpoint_hears_of_what_it_asked_for(transport: AsyncTransport) -> None:
    with receiving() as everybodys, receiving() as own, receiving() as failures:
        await add(transport, everybodys.url)
        await add(transport, own.url, key_id="mine")
        await add(transport, failures.url, event_types=("batch.failed",))
        for key_id, event_type in (("mine", "completed"), ("other", "completed"), (None, "failed")):
            await tell(transport, f"batch_{key_id}", f"batch.{event_type}", key_id)
        async with dispatching(transport):
            heard = {json.loads((await next_of(everybodys)).body)["data"]["id"] for _ in range(3)}
            assert json.loads((await next_of(own)).body)["data"]["id"] == "batch_mine"
            assert json.loads((await next_of(failures)).body)["type"] == "batch.failed"
    assert heard == {"batch_mine", "batch_other", "batch_None"}
    assert (everybodys.num_received, own.num_received, failures.num_received) == (3, 1, 1)


async def test_a_failed_delivery_is_tried_again_under_the_same_id(transport: AsyncTransport) -> None:
    asked: list[tuple[int, float | None]] = []

    def delay_after(attempt: int, retry_after: float | None) -> float:
        asked.append((attempt, retry_after))
        return 0.0

    replies = [Reply(500), Reply(503, (("retry-after", "7"),)), Reply(302, (("location", "http://127.0.0.1/"),))]
    with receiving(lambda number: replies[number - 1] if number <= 3 else Reply()) as receiver:
        await add(transport, receiver.url)
        event = await tell(transport, "batch_1")
        async with dispatching(transport, delay_after=delay_after):
            got = [await next_of(receiver) for _ in range(4)]
    assert {one.headers["webhook-id"] for one in got} == {event.id}
    assert {one.body for one in got} == {event.to_body()}
    assert asked == [(1, None), (2, 7.0), (3, None)]


async def test_what_nobody_takes_is_dead_and_can_be_seen_and_revived(
    transport: AsyncTransport, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    is_up = threading.Event()
    with receiving(lambda number: Reply(200 if is_up.is_set() else 500)) as receiver:
        endpoint = await add(transport, receiver.url)
        event = await tell(transport, "batch_1")
        async with dispatching(transport, delay_after=lambda attempt, _: 0.0 if attempt < 3 else None):
            await eventually(lambda: redis_client.zcard(BATCHES.dead))
            [dead] = await transport.run(list_deliveries())
            assert (dead.id, dead.is_dead, dead.num_attempts) == (f"{event.id}:{endpoint.id}", True, 3)
            assert dead.error == "answered 500"
            assert receiver.num_received == 3
            assert any("action=webhook_dead" in record.message for record in caplog.records)
            is_up.set()
            assert await transport.run(revive_deliveries([dead.id, "unknown"])) == [dead.id]
            await eventually(
                lambda: receiver.num_received == 4 and not redis_client.exists(BATCHES.receivers, BATCHES.dead)
            )
    assert await transport.run(list_deliveries()) == []


async def test_a_dead_delivery_is_kept_for_a_week_and_a_revived_one_until_it_ends(
    transport: AsyncTransport, redis_client: Redis
) -> None:
    await add(transport, "http://127.0.0.1:9/")
    await tell(transport, "batch_1")
    [claimed] = await transport.run(claim_deliveries(10))
    await transport.run(settle_delivery(claimed, "dead", error="answered 500"))
    assert DEAD_TTL_SECONDS - 60 < redis_client.ttl(BATCHES.prefix + claimed.id) <= DEAD_TTL_SECONDS
    assert await transport.run(revive_deliveries([claimed.id])) == [claimed.id]
    assert redis_client.ttl(BATCHES.prefix + claimed.id) == -1


def test_attempts_grow_apart_over_a_day() -> None:
    for attempt, base in enumerate(RETRY_DELAYS, start=1):
        delay = retry_delay(attempt, None)
        assert delay is not None and 0.8 * base <= delay <= 1.2 * base
    assert 20 * 3600 < sum(RETRY_DELAYS) < 30 * 3600
    assert retry_delay(len(RETRY_DELAYS) + 1, None) is None
    assert retry_delay(1, 60.0) == 60.0
    assert retry_delay(1, 1e9) == 21600.0
    assert len({retry_delay(5, None) for _ in range(10)}) > 1


async def test_an_endpoint_that_is_gone_is_called_no_more(transport: AsyncTransport, redis_client: Redis) -> None:
    with receiving(lambda number: Reply(410)) as receiver:
        endpoint = await add(transport, receiver.url)
        await tell(transport, "batch_1")
        async with dispatching(transport):
            await eventually(lambda: redis_client.hexists(DISABLED_KEY, endpoint.id))
            await tell(transport, "batch_2")
            await eventually(lambda: not redis_client.exists(OUTBOX_KEY))
    assert receiver.num_received == 1
    [dead] = await transport.run(list_deliveries())
    assert dead.is_dead and dead.error == "answered 410"


async def test_an_endpoint_that_was_gone_is_called_again_once_it_is_changed(
    transport: AsyncTransport, redis_client: Redis
) -> None:
    with receiving() as receiver:
        old = await add(transport, receiver.url)
        await transport.run(disable_endpoint(old.id))
        assert await transport.run(replace_endpoint(old, old.changed(name="mended")))
        assert not redis_client.exists(DISABLED_KEY)
        await tell(transport, "batch_1")
        async with dispatching(transport):
            await next_of(receiver)


async def test_what_was_under_way_to_an_endpoint_that_was_removed_is_dropped(
    transport: AsyncTransport, redis_client: Redis
) -> None:
    endpoint = await add(transport, "http://127.0.0.1:9/")
    await tell(transport, "batch_1")
    async with dispatching(transport, delay_after=lambda attempt, _: 0.0):
        await eventually(lambda: redis_client.zcard(BATCHES.receivers))
        await transport.run(remove_endpoint(endpoint.id))
        await eventually(lambda: not redis_client.exists(BATCHES.receivers))
    assert not list(redis_client.scan_iter(BATCHES.prefix + "*"))


async def test_a_slow_receiver_does_not_hold_up_the_others(transport: AsyncTransport) -> None:
    release = threading.Event()
    with receiving(lambda number: Reply(holds=release)) as slow, receiving() as quick:
        await add(transport, slow.url)
        await add(transport, quick.url)
        await tell(transport, "batch_1")
        async with dispatching(transport):
            await next_of(slow)
            await next_of(quick)
            await tell(transport, "batch_2")
            await next_of(quick)
            release.set()


async def test_a_backlog_keeps_no_other_endpoint_waiting_and_costs_a_claim_nothing(
    transport: AsyncTransport, redis_client: Redis
) -> None:
    slow, fine = (
        await add(transport, "http://slow/", key_id="slow"),
        await add(transport, "http://fine/", key_id="fine"),
    )
    event = Event.of("batch.completed", "batch_1", key_id="slow", created_at=1_700_000_000)
    with redis_client.pipeline() as pipe:
        for number in range(10_000):
            owe(pipe, BATCHES, slow.id, f"{number}:{slow.id}")
            pipe.hset(f"{BATCHES.prefix}{number}:{slow.id}", mapping={"event": event.to_wire(), "endpoint": slow.id})
        pipe.execute()
    await tell(transport, "batch_2", key_id="fine")
    redis_client.config_resetstat()
    claimed = await transport.run(claim_deliveries(1, under_way={slow.id: MAX_TO_ENDPOINT}))
    assert [one.endpoint.id for one in claimed] == [fine.id]
    assert sum(one["calls"] for one in redis_client.info("commandstats").values()) < 30


async def test_many_replicas_deliver_each_event_once(transport: AsyncTransport, redis_client: Redis) -> None:
    with receiving() as receiver:
        await add(transport, receiver.url)
        events = {(await tell(transport, f"batch_{number}")).id for number in range(50)}
        async with dispatching(transport), dispatching(transport), dispatching(transport):
            await eventually(lambda: not redis_client.exists(OUTBOX_KEY, BATCHES.receivers))
    got = [receiver.next(1).headers["webhook-id"] for _ in range(50)]
    assert set(got) == events and receiver.num_received == 50


async def test_an_attempt_that_was_overtaken_settles_nothing_but_a_success(transport: AsyncTransport) -> None:
    await add(transport, "http://127.0.0.1:9/")
    await tell(transport, "batch_1")
    [first] = await transport.run(claim_deliveries(10, lease_seconds=0.0))
    [second] = await transport.run(claim_deliveries(10))
    assert (first.attempt, second.attempt) == (1, 2)
    await transport.run(settle_delivery(first, "dead", error="late"))
    [pending] = await transport.run(list_deliveries())
    assert not pending.is_dead and pending.error == ""
    await transport.run(settle_delivery(first, "delivered"))
    assert await transport.run(list_deliveries()) == []
    await transport.run(settle_delivery(second, "retry", error="late"))
    assert await transport.run(list_deliveries()) == []


async def test_a_success_that_is_told_of_late_ends_a_delivery_that_was_given_up(transport: AsyncTransport) -> None:
    await add(transport, "http://127.0.0.1:9/")
    await tell(transport, "batch_1")
    [first] = await transport.run(claim_deliveries(10, lease_seconds=0.0))
    [last] = await transport.run(claim_deliveries(10))
    await transport.run(settle_delivery(last, "dead", error="no answer"))
    await transport.run(settle_delivery(first, "delivered"))
    assert await transport.run(count_deliveries()) == WebhookCounts()
