"""A round trip of the asyncio client: whose replies are whose where one is an error, or nobody waits any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import redis
import redis.asyncio

from producer.exchange import exchange
from producer.redis_connection import CONNECTION_OPTIONS, make_async_pool


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[redis.asyncio.ConnectionPool]:
    async with aclosing(make_async_pool(redis_url, CONNECTION_OPTIONS)) as pool:
        yield pool


async def ask(pool: redis.asyncio.ConnectionPool, *commands: tuple[Any, ...]) -> list[Any]:
    return await exchange(pool, redis.asyncio.Redis.from_pool(pool).response_callbacks, commands)


async def test_replies_have_the_form_that_redis_py_gives_them(pool: redis.asyncio.ConnectionPool) -> None:
    replies = await ask(pool, ("XADD", "s", "1-1", "d", "x"), ("XRANGE", "s", "-", "+"), ("SCRIPT LOAD", "return 1"))
    assert replies[1] == [(b"1-1", {b"d": b"x"})]
    assert await ask(pool, ("EVALSHA", replies[2], 0)) == [1]


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_an_error_is_raised_once_all_replies_are_read(pool: redis.asyncio.ConnectionPool, at: int) -> None:
    commands: list[tuple[Any, ...]] = [("SET", "a", 1), ("SET", "b", 2)]
    commands.insert(at, ("HGET", "a"))
    with pytest.raises(redis.ResponseError, match="wrong number of arguments"):
        await ask(pool, *commands)
    assert await ask(pool, ("MGET", "a", "b")) == [[b"1", b"2"]]


async def test_replies_that_nobody_waits_for_are_nobody_elses(pool: redis.asyncio.ConnectionPool) -> None:
    waiting = asyncio.ensure_future(ask(pool, ("BLPOP", "nothing", 10), ("ECHO", "stale")))
    while not (await ask(pool, ("INFO", "clients")))[0]["blocked_clients"]:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await ask(pool, ("ECHO", "mine")) == [b"mine"]
