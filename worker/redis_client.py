"""Connects to Redis with the timeouts that the worker needs, and checks the server.

The client retries no command, because a write may have happened although its reply was lost. Callers retry what is safe
to repeat.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.client import Pipeline
from redis.connection import AbstractConnection
from redis.exceptions import ClusterError, OutOfMemoryError

import producer.redis_connection as redis_connection
from producer.redis_failures import explain
from producer.server_version import is_too_old
from worker.errors import StartRefusedError

SOCKET_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 2.0
HEALTH_CHECK_SECONDS = 30

# The errors of a Redis that cannot serve now but may later: the work is kept and tried again.
REDIS_AWAY = (redis.ConnectionError, redis.TimeoutError, OutOfMemoryError)


def connect(url: str) -> redis.Redis:
    """A client with its own pool. Connects on first use; with Sentinels always to the current master."""
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "health_check_interval": HEALTH_CHECK_SECONDS,
    }
    return redis_connection.connect(url, options)


def execute_each(pipe: Pipeline) -> list[Any]:
    """A pipeline's replies, with the error in place of a reply to a refused command. Raises the error of a Redis that
    cannot serve: then all commands are to be tried again."""
    replies: list[Any] = pipe.execute(raise_on_error=False)
    if away := [reply for reply in replies if isinstance(reply, REDIS_AWAY)]:
        raise away[0]
    return replies


def which_exist(client: redis.Redis, names: Sequence[str]) -> set[str]:
    """Which of these keys exist. Usually none, which takes one command; at most two round trips."""
    if not names or not client.exists(*names):
        return set()
    with client.pipeline(transaction=False) as look:
        for name in names:
            look.exists(name)
        return {name for name, exists in zip(names, look.execute(), strict=True) if exists}


def open_connection(client: redis.Redis) -> AbstractConnection:
    """A connection outside the client's pool, for reading pushed messages; the caller disconnects it.

    It speaks RESP2, in which they come as messages; in RESP3 redis-py does not pass them on. Raises Redis's errors.
    """
    pool = client.connection_pool
    connection: AbstractConnection = pool.connection_class(**{**pool.connection_kwargs, "protocol": 2})
    # Without an explicit connect, a lazily connected one would not ask a Sentinel for the master.
    connection.connect()  # type: ignore[no-untyped-call]
    return connection


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Around a worker's use of Redis before it serves, when it does not wait for Redis. Raises StartRefusedError, with
    the remedy, if Redis refuses the worker or goes away."""
    try:
        yield
    except redis.RedisError as error:
        raise StartRefusedError(explain(error, url)) from error


def check_server(client: redis.Redis, url: str) -> None:
    """Raises StartRefusedError, with the remedy, if the server could lose jobs."""
    with reached(url):
        fault = find_fault(client, url)
    if fault is not None:
        raise StartRefusedError(fault)


def find_fault(client: redis.Redis, url: str) -> str | None:
    """Why this server could lose jobs while it runs, with the remedy; None if it could not. Raises Redis's errors."""
    server, memory = client.info("server"), client.info("memory")
    if (problem := is_too_old(server)) is not None:
        return problem
    if "cluster" in (server.get("redis_mode"), server.get("server_mode")):  # Redis's field, and Valkey's
        return explain(ClusterError(), url)
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return None
    return (
        f"Redis evicts keys when its memory is full (maxmemory-policy {policy}), which loses jobs: "
        "run CONFIG SET maxmemory-policy noeviction, and set it in redis.conf"
    )


def find_weakness(client: redis.Redis) -> str | None:
    """What this server would lose when it stops, with the remedy; this may be intended. Raises Redis's errors."""
    if client.info("persistence").get("aof_enabled") or client.info("replication").get("connected_slaves"):
        return None
    return (
        "Redis writes no append-only file and has no replica: if it ends, jobs since its last snapshot are lost; "
        "run CONFIG SET appendonly yes, and set it in redis.conf"
    )
