"""Gateways as processes: one that is killed between a delivery and its record leaves it to another."""

import threading
import time
from collections.abc import Callable

import openai
import redis

from producer.deliveries import BATCHES
from producer.gateway.webhooks.endpoints import WebhookEndpoint, add_endpoint
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.operations import send
from producer.transport import Transport
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.owed_deliveries import make_due, owed
from tests.fakes.waiting import wait_until
from tests.fakes.webhook_receiver import Reply, receiving


def test_what_a_killed_replica_had_delivered_unrecorded_is_delivered_again_under_the_same_id(
    redis_url: str, redis_client: redis.Redis, start_process: Callable[..., GatewayProcess]
) -> None:
    release = threading.Event()
    with receiving(lambda number: Reply(holds=release if number == 1 else None)) as receiver:
        endpoint = WebhookEndpoint.create(name="test", url=receiver.url, key_id=None)
        event = Event.of("batch.completed", "batch_1", key_id=None, created_at=1_700_000_000)
        transport = Transport(redis_url)
        transport.run(add_endpoint(endpoint))
        transport.run(send(("RPUSH", OUTBOX_KEY, event.to_wire())))
        transport.close()
        killed = start_process("--webhook-private-targets")
        first = receiver.next(60)
        killed.kill()
        [(delivery, leased_until)] = owed(redis_client, BATCHES).items()
        assert time.time() + 20 < leased_until < time.time() + 60  # nobody else has it before
        make_due(redis_client, BATCHES, delivery, time.time())  # the lease's time has passed
        start_process("--webhook-private-targets")
        second = receiver.next(60)
        wait_until(lambda: not redis_client.exists(BATCHES.receivers))
        release.set()
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == event.id
    assert first.body == second.body
    unwrap = openai.OpenAI(api_key="none").webhooks.unwrap
    assert unwrap(second.body, second.headers, secret=endpoint.secret).id == event.id
    assert receiver.num_received == 2
