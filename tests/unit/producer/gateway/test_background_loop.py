"""What goes on beside a gateway's requests goes on, whatever goes wrong once."""

import asyncio
from typing import Any, cast

import pytest

from producer.errors import RedisUnavailableError
from producer.gateway.background_loop import BackgroundLoop
from producer.gateway.batches import carrier_child
from producer.gateway.batches.carrier_child import CarrierChild
from producer.gateway.settings import GatewaySettings
from tests.fakes.waiting import eventually

WAIT_SECONDS = 30.0


class OneOpenBatch:
    async def num_without_carrier(self) -> int:
        return 1


async def test_a_carrier_that_cannot_be_started_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, started = asyncio.get_running_loop(), asyncio.Event()
    tries: list[None] = []

    def start() -> Any:
        tries.append(None)
        if len(tries) == 1:
            loop.call_soon_threadsafe(child.wake)
            raise OSError("no process left, for now")
        loop.call_soon_threadsafe(started.set)
        raise OSError("nor for the test's purposes")

    monkeypatch.setattr(carrier_child, "_start", start)
    child = CarrierChild(GatewaySettings(), cast(Any, OneOpenBatch()))
    child.start()
    child.wake()
    async with asyncio.timeout(WAIT_SECONDS):
        await started.wait()
    await child.aclose()


class FailingOnce(BackgroundLoop):
    """Its first turn raises, and the others come when it is woken."""

    def __init__(self, error: Exception) -> None:
        super().__init__("test", retry_seconds=0.0)
        self._error = error
        self.num_turns = 0

    async def _turn(self) -> float:
        self.num_turns += 1
        if self.num_turns == 1:
            raise self._error
        return 3600.0


@pytest.mark.parametrize("error", [RuntimeError("nobody expected this"), RedisUnavailableError("it is away")])
async def test_a_turn_follows_one_that_failed_and_one_more_when_it_is_woken(error: Exception) -> None:
    loop = FailingOnce(error)
    loop.start()
    await eventually(lambda: loop.num_turns == 2)
    loop.wake()
    await eventually(lambda: loop.num_turns == 3)
    await loop.aclose()
