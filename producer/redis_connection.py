"""How Redis is connected to, alone or behind Sentinels, and redis-py's errors as the client's own.

redis-py's own retries are off: it would repeat blindly what its callers repeat knowingly.
"""

import socket
import ssl
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from producer.contract.sentinel_url import SentinelUrl
from producer.errors import PromptmillError, RedisRefusedError, RedisUnavailableError
from producer.operations import ConnectionLost, NoConnection
from producer.redis_failures import explain, has_no_connection, is_lost, is_refusal
from producer.redis_replies import AsyncReplyParser, ReplyParser

CONNECT_TIMEOUT_SECONDS = 5.0
REPLY_TIMEOUT_SECONDS = 15.0
MAX_ASYNC_CONNECTIONS = 32  # of one client; its subscriptions share one of them, and who finds none free waits
MAX_CONNECTIONS = 1 << 16  # of one client: each thread holds two at most, and who waited for one might hold another
HEALTH_CHECK_SECONDS = 30  # a silent subscription is asked whether it still lives

CONNECTION_OPTIONS: dict[str, Any] = {
    "protocol": 2,  # one form of replies with every redis-py
    "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "socket_timeout": REPLY_TIMEOUT_SECONDS,
    "health_check_interval": HEALTH_CHECK_SECONDS,
}
if hasattr(redis, "DriverInfo"):  # since 7.1; without it, each connection reads redis-py's version from disk again
    CONNECTION_OPTIONS["driver_info"] = redis.DriverInfo()


class PromptSSLConnection(redis.SSLConnection):
    """Gives up on a handshake as soon as on a connect: a port without TLS answers neither."""

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        sock.settimeout(self.socket_connect_timeout)
        wrapped: ssl.SSLSocket = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        wrapped.settimeout(self.socket_timeout)
        return wrapped


class _PromptSentinelSSLConnection(SentinelManagedConnection, PromptSSLConnection):
    pass


class _BlockingSentinelPool(redis.asyncio.sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """redis-py's own refuses whoever finds no connection free."""


def connect(url: str, options: dict[str, Any]) -> redis.Redis:
    """A client of its own pool; connects on first use, and behind Sentinels always to the present master."""
    options = {"retry": Retry(NoBackoff(), 0), **options}
    to_master = {"parser_class": ReplyParser, "max_connections": MAX_CONNECTIONS}
    behind = SentinelUrl.parse(url)
    if behind is None:
        if url.startswith("rediss://"):
            to_master["connection_class"] = PromptSSLConnection
        return redis.Redis.from_url(url, **to_master, **options)
    if behind.tls:
        to_master["connection_class"] = _PromptSentinelSSLConnection
    to_sentinels = {**options, **behind.tls, "max_connections": MAX_CONNECTIONS}
    sentinel: Any = Sentinel(behind.sentinels, sentinel_kwargs=to_sentinels, **options)  # type: ignore[no-untyped-call]
    master: redis.Redis = sentinel.master_for(behind.service, **to_master, **behind.options)
    return master


def close(client: redis.Redis) -> None:
    """With what it asks Sentinels by."""
    client.close()
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager is not None else ():
        sentinel.close()


def make_async_pool(url: str, options: dict[str, Any]) -> redis.asyncio.ConnectionPool:
    """As `connect`, for asyncio: who finds no connection free waits for one."""
    options = {"retry": redis.asyncio.retry.Retry(NoBackoff(), 0), **options}
    waiting = {"max_connections": MAX_ASYNC_CONNECTIONS, "timeout": REPLY_TIMEOUT_SECONDS}
    to_master = {"parser_class": AsyncReplyParser, **waiting}
    behind = SentinelUrl.parse(url)
    if behind is None:
        return redis.asyncio.BlockingConnectionPool.from_url(url, **to_master, **options)
    sentinel: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        behind.sentinels, sentinel_kwargs={**options, **behind.tls}, **options
    )
    master = sentinel.master_for(
        behind.service, connection_pool_class=_BlockingSentinelPool, **to_master, **behind.options
    )
    pool: redis.asyncio.ConnectionPool = master.connection_pool
    return pool


def translate(error: Exception, url: str) -> PromptmillError:
    """ConnectionLost where trying again may help, RedisRefusedError where it will not; all name the remedy."""
    message = explain(error, url)
    if is_refusal(error):
        return RedisRefusedError(message)
    if has_no_connection(error):
        return NoConnection(message)
    return ConnectionLost(message) if is_lost(error) else RedisUnavailableError(message)
