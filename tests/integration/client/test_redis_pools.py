"""More callers at once than redis-py's pools have connections, of a Redis alone and behind Sentinels."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest

from producer.async_transport import AsyncTransport
from producer.operations import Protocol, Send
from producer.redis_connection import MAX_ASYNC_CONNECTIONS
from producer.transport import Transport
from tests.fakes.sentinel_trio import SentinelTrio

NUM_CALLERS = 150  # redis-py's own pools end at 100
HOLD_SECONDS = 0.1


@pytest.fixture(params=["alone", "sentinels"])
def url(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Iterator[str]:
    if request.param == "alone":
        yield redis_url
        return
    with SentinelTrio(tmp_path) as trio:
        yield trio.url


def hold(number: int) -> Protocol[list[Any]]:
    """A connection, for a moment. Tried once: what is tried again would hide a refusal."""
    return (yield Send([("BLPOP", f"nothing-{number}", HOLD_SECONDS)]))  # type: ignore[no-any-return]


async def test_asyncio_callers_wait_for_a_connection(url: str) -> None:
    async with aclosing(AsyncTransport(url)) as transport:
        assert await asyncio.gather(*map(transport.run, map(hold, range(NUM_CALLERS)))) == [[None]] * NUM_CALLERS
        [listed] = await transport.run(count_connections())
    assert listed.count(b"cmd=blpop") <= MAX_ASYNC_CONNECTIONS


def test_threads_never_wait_for_each_others_connection(url: str) -> None:
    begin = threading.Barrier(NUM_CALLERS)

    def call(number: int) -> list[Any]:
        begin.wait()
        return transport.run(hold(number))

    with closing(Transport(url)) as transport, ThreadPoolExecutor(NUM_CALLERS) as threads:
        assert list(threads.map(call, range(NUM_CALLERS))) == [[None]] * NUM_CALLERS


def count_connections() -> Protocol[list[bytes]]:
    return (yield Send([("CLIENT LIST",)]))  # type: ignore[no-any-return]
