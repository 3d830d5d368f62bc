"""Connections to Redis with the timeouts and retries that the worker's promises need, and the checks of a server.

No command is retried by the client: a lost reply may hide a write that happened. Who can repeat a write safely does.
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

# What says that Redis cannot serve right now, and may later: the work is kept and tried again.
REDIS_AWAY = (redis.ConnectionError, redis.TimeoutError, OutOfMemoryError)


def connect(url: str) -> redis.Redis:
    """A client of its own pool; connects on first use, and behind Sentinels always to the present master."""
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "health_check_interval": HEALTH_CHECK_SECONDS,
    }
    return redis_connection.connect(url, options)


def execute_each(pipe: Pipeline) -> list[Any]:
    """A pipeline's replies, an error where Redis has something against a single command. Raises what says that it is
    away: then all of them are to be tried again."""
    replies: list[Any] = pipe.execute(raise_on_error=False)
    if away := [reply for reply in replies if isinstance(reply, REDIS_AWAY)]:
        raise away[0]
    return replies


def which_exist(client: redis.Redis, names: Sequence[str]) -> set[str]:
    """Which of these keys there are: mostly none, which one command says, and never more than two round trips."""
    if not names or not client.exists(*names):
        return set()
    with client.pipeline(transaction=False) as look:
        for name in names:
            look.exists(name)
        return {name for name, exists in zip(names, look.execute(), strict=True) if exists}


def open_connection(client: redis.Redis) -> AbstractConnection:
    """A connection outside the client's pool, for who reads what the server says unasked; the caller disconnects it.

    It speaks RESP2, in which that comes as messages; in RESP3 redis-py keeps it to itself. Raises what Redis raises.
    """
    pool = client.connection_pool
    connection: AbstractConnection = pool.connection_class(**{**pool.connection_kwargs, "protocol": 2})
    # What connects only when it is sent something asks no Sentinel where the master is.
    connection.connect()  # type: ignore[no-untyped-call]
    return connection


@contextmanager
def reached(url: str) -> Iterator[None]:
    """What a worker needs Redis for before it serves: there is nothing to wait for yet. Raises StartRefusedError, with
    the remedy, where Redis refuses it or goes away meanwhile."""
    try:
        yield
    except redis.RedisError as error:
        raise StartRefusedError(explain(error, url)) from error


def check_server(client: redis.Redis, url: str) -> None:
    """Raises StartRefusedError, with the remedy, where jobs could be lost."""
    with reached(url):
        fault = find_fault(client, url)
    if fault is not None:
        raise StartRefusedError(fault)


def find_fault(client: redis.Redis, url: str) -> str | None:
    """Why this server could lose jobs while it runs, with the remedy. Raises what Redis raises."""
    server, memory = client.info("server"), client.info("memory")
    if (problem := is_too_old(server)) is not None:
        return problem
    if "cluster" in (server.get("redis_mode"), server.get("server_mode")):  # Redis' word for it, and Valkey's
        return explain(ClusterError(), url)
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return None
    return (
        f"Redis evicts keys when its memory is full (maxmemory-policy {policy}), which loses jobs: "
        "run CONFIG SET maxmemory-policy noeviction, and set it in redis.conf"
    )


def find_weakness(client: redis.Redis) -> str | None:
    """What this server would lose by its end, with the remedy; it may be meant so. Raises what Redis raises."""
    if client.info("persistence").get("aof_enabled") or client.info("replication").get("connected_slaves"):
        return None
    return (
        "Redis writes no append-only file and has no replica: if it ends, jobs since its last snapshot are lost; "
        "run CONFIG SET appendonly yes, and set it in redis.conf"
    )
