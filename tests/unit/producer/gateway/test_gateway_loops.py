"""What goes on beside a gateway's requests goes on, whatever goes wrong once."""

import asyncio
from typing import Any, cast

import pytest

from producer.gateway.batches import carrier_child
from producer.gateway.batches.carrier_child import CarrierChild
from producer.gateway.files.housekeeping import FileHousekeeping
from producer.gateway.settings import GatewaySettings

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


class BrokenOnce:
    """Files' records of which the first look raises what nobody expected."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.has_looked_again = asyncio.Event()

    async def expire(self) -> list[str]:
        self.num_looks += 1
        if self.num_looks == 1:
            raise RuntimeError("nobody expected this")
        self.has_looked_again.set()
        return []

    async def due_parts(self) -> list[str]:
        return []


async def test_a_failure_that_nobody_expected_ends_no_housekeeping_of_files() -> None:
    records = BrokenOnce()
    housekeeping = FileHousekeeping(cast(Any, records), cast(Any, None), cast(Any, None))
    housekeeping.start()
    async with asyncio.timeout(WAIT_SECONDS):
        while not records.has_looked_again.is_set():
            housekeeping.want()
            await asyncio.sleep(0)
    await housekeeping.aclose()
