"""Webhook dispatchers in a test's own loop, with its own resolver and delays; endpoints and events for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from producer.async_transport import AsyncTransport
from producer.gateway.webhooks.dispatcher import WebhookDispatcher
from producer.gateway.webhooks.endpoints import WebhookEndpoint, add_endpoint
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.gateway.webhooks.sender import WebhookSender
from producer.gateway.webhooks.targets import Resolver, TargetRules
from producer.operations import send
from tests.fakes.webhook_receiver import Received, WebhookReceiver


@asynccontextmanager
async def dispatching(
    transport: AsyncTransport,
    *,
    allows_private: bool = True,
    resolve: Resolver | None = None,
    delay_after: Callable[[int, float | None], float | None] = lambda attempt, retry_after: 0.0,
    lease_seconds: float = 30.0,
) -> AsyncIterator[WebhookDispatcher]:
    sender = WebhookSender(TargetRules(allows_private=allows_private, resolve=resolve))
    dispatcher = WebhookDispatcher(transport, sender, delay_after=delay_after, lease_seconds=lease_seconds)
    dispatcher.start()
    try:
        yield dispatcher
    finally:
        await dispatcher.aclose()


async def add(transport: AsyncTransport, url: str, key_id: str | None = None, **fields: object) -> WebhookEndpoint:
    endpoint = WebhookEndpoint.create(name="test", url=url, key_id=key_id).changed(**fields)
    await transport.run(add_endpoint(endpoint))
    return endpoint


async def tell(
    transport: AsyncTransport, batch_id: str, event_type: str = "batch.completed", key_id: str | None = "k"
) -> Event:
    event = Event.of(event_type, batch_id, key_id=key_id, created_at=1_700_000_000)  # type: ignore[arg-type]
    await transport.run(send(("RPUSH", OUTBOX_KEY, event.to_wire())))
    return event


async def next_of(receiver: WebhookReceiver) -> Received:
    return await asyncio.to_thread(receiver.next)
