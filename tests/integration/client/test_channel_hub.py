"""The one pub/sub connection of an asyncio client: how long a wait lasts, and when a silent connection is given up."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import redis.asyncio

from producer import channel_hub
from producer.channel_hub import ChannelHub
from worker.embedded_redis import EmbeddedRedis

WAIT_SECONDS = 30.0
SHORT_SECONDS = 0.05


@asynccontextmanager
async def open_hub(url: str, *, reply_timeout_seconds: float = WAIT_SECONDS) -> AsyncIterator[ChannelHub]:
    pool = redis.asyncio.ConnectionPool.from_url(url, protocol=2, max_connections=1)
    hub = ChannelHub(pool, reply_timeout_seconds=reply_timeout_seconds)
    try:
        yield hub
    finally:
        await hub.aclose()
        await pool.aclose()


async def test_a_wait_lasts_as_long_as_it_says_whatever_the_ones_before_said(
    redis_url: str, redis_client: redis.Redis
) -> None:
    async with open_hub(redis_url) as hub:
        mailbox = await hub.subscribe(["a"])
        for timeout in (WAIT_SECONDS, 2 * WAIT_SECONDS, WAIT_SECONDS):
            waiting = asyncio.ensure_future(mailbox.get(timeout))
            await asyncio.sleep(0)  # it waits before the message comes
            redis_client.publish("a", "hello")
            assert await waiting == b"hello"
        for timeout in (2 * SHORT_SECONDS, SHORT_SECONDS, 2 * SHORT_SECONDS):
            start = time.monotonic()
            assert await mailbox.get(timeout) is None
            assert timeout * 0.99 <= time.monotonic() - start < WAIT_SECONDS


async def test_a_silent_connection_that_answers_is_kept(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_hub, "SILENCE_SECONDS", SHORT_SECONDS)

    async with open_hub(redis_url, reply_timeout_seconds=3.0) as hub:
        mailbox = await hub.subscribe(["a"])
        num_pings = pings(redis_client)
        while pings(redis_client) < num_pings + 2:
            assert await mailbox.get(SHORT_SECONDS) is None
        redis_client.publish("a", "hello")
        assert await mailbox.get(WAIT_SECONDS) == b"hello"


def pings(client: redis.Redis) -> int:
    return int(client.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"])


async def test_a_connection_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_hub, "SILENCE_SECONDS", SHORT_SECONDS)

    with EmbeddedRedis() as server:
        async with open_hub(server.url, reply_timeout_seconds=1.0) as hub:
            mailbox = await hub.subscribe(["a"])
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(redis.ConnectionError, match="no answer to PING"):
                    await mailbox.get(WAIT_SECONDS)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            mailbox = await hub.subscribe(["a"])  # on a new connection
            with redis.Redis.from_url(server.url) as client:
                client.publish("a", "hello")
            assert await mailbox.get(WAIT_SECONDS) == b"hello"


async def test_who_subscribes_while_a_lost_connection_is_being_closed_hears_of_the_loss(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for an acknowledgement that nobody had asked for. A peer that does not answer to TLS' farewell, either,
    takes no place in the pool."""
    is_closing, may_close = asyncio.Event(), asyncio.Event()
    disconnect = redis.asyncio.Connection.disconnect

    async def time_out(self: redis.asyncio.Connection, nowait: bool = False, **others: Any) -> None:
        await disconnect(self, nowait, **others)
        if not nowait:  # as the hub closes it
            is_closing.set()
            await may_close.wait()
            raise redis.TimeoutError("Timed out closing connection")

    async with open_hub(redis_url) as hub:
        await hub.subscribe(["a"])
        monkeypatch.setattr(redis.asyncio.Connection, "disconnect", time_out)
        redis_client.client_kill_filter(_type="pubsub")
        await is_closing.wait()
        late = asyncio.ensure_future(hub.subscribe(["b"]))
        await asyncio.sleep(0)  # it waits
        may_close.set()
        with pytest.raises(redis.ConnectionError):
            await late
        await hub.subscribe(["b"])
        monkeypatch.undo()
