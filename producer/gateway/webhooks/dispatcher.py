"""Delivers webhooks from one gateway process; every replica runs one, and Redis shares the work out between them.

At least once: a delivery is settled when its receiver has answered. If a process dies in between, another one delivers
it again, under the same webhook-id.
"""

import asyncio
import logging
from collections import Counter

from producer.async_transport import AsyncTransport
from producer.deliveries import GONE, LOG_LEVELS, Answer, RetryDelay, retry_delay, settle_answer
from producer.end_tasks import end_tasks
from producer.errors import RedisUnavailableError
from producer.gateway.background_loop import BackgroundLoop
from producer.gateway.webhooks.deliveries import LEASE_SECONDS, EventDelivery, claim_deliveries
from producer.gateway.webhooks.endpoints import disable_endpoint
from producer.gateway.webhooks.sender import WebhookSender

POLL_SECONDS = 1.0
REDIS_AWAY_SECONDS = 5.0
MAX_CONCURRENT = 32  # a receiver that is slow holds one of them for an attempt's time
STOP_SECONDS = 5.0  # for attempts under way when the process ends

_log = logging.getLogger(__name__)


class WebhookDispatcher(BackgroundLoop):
    def __init__(
        self,
        redis: AsyncTransport,
        sender: WebhookSender,
        *,
        delay_after: RetryDelay = retry_delay,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        super().__init__("webhooks", retry_seconds=REDIS_AWAY_SECONDS)
        self._redis = redis
        self._sender = sender
        self._delay_after = delay_after
        self._lease_seconds = lease_seconds
        self._under_way: dict[asyncio.Task[None], str] = {}  # by task, whose endpoint it is

    async def aclose(self) -> None:
        """Claim no more; what is under way has a few seconds, then its lease runs out and another replica has it."""
        await super().aclose()
        if self._under_way:
            _, late = await asyncio.wait(set(self._under_way), timeout=STOP_SECONDS)
            await end_tasks(*late)

    async def _turn(self) -> float:
        """Take on what is due, as much as there is room for."""
        while (room := MAX_CONCURRENT - len(self._under_way)) > 0:
            counts = Counter(self._under_way.values())
            claimed = await self._redis.run(claim_deliveries(room, self._lease_seconds, under_way=counts))
            for delivery in claimed:
                task = asyncio.create_task(self._deliver(delivery))
                self._under_way[task] = delivery.endpoint.id
                task.add_done_callback(self._forget)
            if len(claimed) < room:
                break
        return POLL_SECONDS

    def _forget(self, task: "asyncio.Task[None]") -> None:
        """There is room for another, perhaps of the same endpoint."""
        del self._under_way[task]
        self.wake()

    async def _deliver(self, delivery: EventDelivery) -> None:
        try:
            answer = await self._sender.send(
                delivery.endpoint.url,
                message_id=delivery.event.id,
                body=delivery.event.to_body(),
                secrets=delivery.endpoint.valid_secrets(),
            )
            await self._settle(delivery, answer)
        except RedisUnavailableError as error:
            _log.warning("action=webhook_unsettled delivery=%s error=%s", delivery.id, error)
        except Exception:
            _log.exception("action=webhook_failed delivery=%s", delivery.id)

    async def _settle(self, delivery: EventDelivery, answer: Answer) -> None:
        if answer.status == GONE:
            await self._redis.run(disable_endpoint(delivery.endpoint.id))
            _log.warning("action=webhook_endpoint_disabled endpoint=%s", delivery.endpoint.id)
        verdict = await self._redis.run(settle_answer(delivery, answer, self._delay_after))
        what = f"delivery={delivery.id} type={delivery.event.type} attempt={delivery.attempt}"
        _log.log(
            LOG_LEVELS[verdict], "action=webhook_%s %s status=%s error=%s", verdict, what, answer.status, answer.problem
        )
