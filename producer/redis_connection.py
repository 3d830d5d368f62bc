"""How this client speaks to Redis: options, and redis-py's errors as the client's own. Opens no connection.

redis-py's own retries are off: it would repeat blindly what the protocols repeat knowingly.
"""

import socket
import ssl
from typing import Any

import redis

from producer.errors import PromptmillError, RedisRefusedError, RedisUnavailableError
from producer.operations import ConnectionLost, NoConnection
from producer.redis_failures import explain, has_no_connection, is_lost, is_refusal

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


class PromptSSLConnection(redis.SSLConnection):
    """Gives up on a handshake as soon as on a connect: a port without TLS answers neither."""

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        sock.settimeout(self.socket_connect_timeout)
        wrapped: ssl.SSLSocket = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        wrapped.settimeout(self.socket_timeout)
        return wrapped


def translate(error: Exception, url: str) -> PromptmillError:
    """ConnectionLost where trying again may help, RedisRefusedError where it will not; all name the remedy."""
    message = explain(error, url)
    if is_refusal(error):
        return RedisRefusedError(message)
    if has_no_connection(error):
        return NoConnection(message)
    return ConnectionLost(message) if is_lost(error) else RedisUnavailableError(message)
