"""Claims batches without a carrier, runs many side by side, and renews their leases. One per process."""

import asyncio
import logging
from collections.abc import Callable

from producer.async_transport import AsyncTransport
from producer.errors import PromptmillError, RedisUnavailableError
from producer.gateway.batches.batch_lease import AnswersLostError, BatchLease, LeaseLostError, Order
from producer.gateway.batches.carrier import Carrier

MAX_CARRIED = 32  # by one process; other batches wait for another replica, or for one of these to end
HEARTBEAT_SECONDS = 1.0  # how soon a cancel is noticed, and how often leases are renewed
RETRY_SECONDS = 15.0  # before a batch that could not be carried on is tried again
REDIS_BACK_SECONDS = 1.0  # the same after an outage of Redis, which takes the batch back once it answers again

MakeCarrier = Callable[[BatchLease], Carrier]

_log = logging.getLogger(__name__)


class CarrierPool:
    def __init__(self, redis: AsyncTransport, make_carrier: MakeCarrier, *, lease_seconds: float) -> None:
        self._redis = redis
        self._make_carrier = make_carrier
        self._lease_seconds = lease_seconds
        self._carried: dict[asyncio.Task[None], BatchLease] = {}
        self._is_awake = asyncio.Event()
        self._is_stopping = False

    def wake(self) -> None:
        """There may be a new batch."""
        self._is_awake.set()

    def stop(self) -> None:
        """Record what is answered, and release the batches to others."""
        self._is_stopping = True
        for lease in self._carried.values():
            lease.give(Order.STOP)
        self.wake()

    async def run(self, idle_seconds: float) -> None:
        """Run until `stop` is called, or there was no batch for `idle_seconds`."""
        loop = asyncio.get_running_loop()
        busy_at = loop.time()
        while self._carried or not (self._is_stopping or loop.time() - busy_at > idle_seconds):
            try:
                await self._beat()
            except PromptmillError as error:
                _log.warning("action=batches_wait error=%s", error)
            if self._carried:
                busy_at = loop.time()
            await self._sleep()

    async def _beat(self) -> None:
        if self._carried:
            await BatchLease.renew(self._redis, list(self._carried.values()), self._lease_seconds)
        while not self._is_stopping and len(self._carried) < MAX_CARRIED:
            lease = await BatchLease.claim(self._redis, self._lease_seconds)
            if lease is None:
                return
            if self._is_stopping:  # told so while the claim was under way
                lease.give(Order.STOP)
            task = asyncio.create_task(self._carry(lease))
            self._carried[task] = lease
            task.add_done_callback(self._forget)

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._is_awake.wait()
        except TimeoutError:
            return
        self._is_awake.clear()

    def _forget(self, task: "asyncio.Task[None]") -> None:
        del self._carried[task]
        self.wake()

    async def _carry(self, lease: BatchLease) -> None:
        try:
            await self._make_carrier(lease).carry()
        except LeaseLostError:
            _log.warning("action=batch_lost batch=%s", lease.record.id)
        except AnswersLostError:
            _log.warning("action=batch_answers_lost batch=%s", lease.record.id)
            await self._put_back(lease, REDIS_BACK_SECONDS)
        except PromptmillError as error:
            _log.warning("action=batch_interrupted batch=%s error=%s", lease.record.id, error)
            await self._put_back(
                lease, REDIS_BACK_SECONDS if isinstance(error, RedisUnavailableError) else RETRY_SECONDS
            )
        except Exception:
            _log.exception("action=batch_failed batch=%s", lease.record.id)
            await self._put_back(lease, RETRY_SECONDS)

    async def _put_back(self, lease: BatchLease, after_seconds: float) -> None:
        try:
            await lease.release(after_seconds)
        except PromptmillError:
            return  # its lease runs out by itself
