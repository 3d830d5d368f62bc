"""How this client speaks to Redis: options, and redis-py's errors in the client's words. Opens no connection.

redis-py's own retries are off: it would repeat blindly what the protocols repeat knowingly.
"""

from typing import Any

import redis

from producer.errors import NO_CLUSTER, REDIS_RIGHTS, PromptmillError, RedisUnavailableError
from producer.operations import ConnectionLost
from producer.redis_replies import NotServingError
from producer.settings import redact_url

CONNECT_TIMEOUT_SECONDS = 5.0
REPLY_TIMEOUT_SECONDS = 15.0
HEALTH_CHECK_SECONDS = 30  # a silent subscription is asked whether it still lives

CONNECTION_OPTIONS: dict[str, Any] = {
    "protocol": 2,  # one form of replies with every redis-py
    "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "socket_timeout": REPLY_TIMEOUT_SECONDS,
    "health_check_interval": HEALTH_CHECK_SECONDS,
}
if hasattr(redis, "DriverInfo"):  # since 7.1; without it, each connection reads redis-py's version from disk again
    CONNECTION_OPTIONS["driver_info"] = redis.DriverInfo()
_LOST = (redis.ConnectionError, redis.TimeoutError, OSError)
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
_CLUSTER = (redis.exceptions.ClusterCrossSlotError, redis.exceptions.ClusterError, redis.exceptions.AskError)


def translate(error: Exception, url: str) -> PromptmillError:
    """ConnectionLost where trying again may help, RedisUnavailableError where it will not; both name the remedy."""
    where, cause = redact_url(url), str(error).rstrip(".")
    if isinstance(error, _REFUSED):
        return RedisUnavailableError(f"Redis at {where} refuses us: {cause}; check user and password in --redis-url")
    if isinstance(error, redis.exceptions.NoPermissionError):
        return RedisUnavailableError(f"Redis at {where} refuses us: {cause}; {REDIS_RIGHTS}")
    if isinstance(error, _CLUSTER):
        return RedisUnavailableError(f"Redis at {where} is part of a cluster: {NO_CLUSTER}")
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return RedisUnavailableError(f"Redis at {where} is full: {cause}; raise maxmemory or drain the queues")
    if isinstance(error, NotServingError):
        return ConnectionLost(f"Redis at {where} does not serve now: {cause}; see to the server")
    if isinstance(error, _LOST):
        return ConnectionLost(
            f"Redis at {where} cannot be reached: {cause}; start it, or name another one with --redis-url or "
            "PROMPTMILL_REDIS_URL"
        )
    return RedisUnavailableError(f"Redis at {where} answers with an error: {cause}")
