"""Notices jobs as they are enqueued, by any client, through Redis's client-side caching, which reports changed keys.

Plain RQ and other languages push onto a list without a notification, and waiting for a list would take from it. So the
watch has Redis report every change of the served queues' keys, of their tenants' queues and of their turns. If tenants
have limits, workers publish the ends of their jobs, because these make room. A server or proxy without client-side
caching is polled every few milliseconds instead: see `ClaimPace`. Knows nothing about claims.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.connection import AbstractConnection
from redis.exceptions import ResponseError

from producer.contract import keys
from producer.rq_names import queue_key
from worker.listener_thread import ListenerThread
from worker.redis_client import open_connection
from worker.rq_bridge import SUSPENDED_KEY

POLL_SECONDS = 1.0
PING_POLLS = 10  # of silence before a PING; after as many more the server counts as gone
INVALIDATIONS = "__redis__:invalidate"  # the channel of the changes; Redis defines its name

_QUEUE_PREFIX = queue_key("")

_log = logging.getLogger(__name__)


class QueueWatch(ListenerThread):
    """The thread that watches the queues. Callbacks run on it."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        queues: Sequence[str],
        has_limits: bool,
        on_arrival: Callable[[list[str]], None],
        on_watching: Callable[[bool], None],
    ) -> None:
        """`has_limits`: whether tenants have limits. `on_arrival` gets the names of tenants' queues with new jobs:
        plain RQ's do not take turns yet. `on_watching` is told whether arrivals are noticed."""
        super().__init__("watch")
        self._client = client
        self._queues = frozenset(queues)
        self._has_limits = has_limits
        self._on_arrival = on_arrival
        self._on_watching = on_watching

    def _listen(self) -> None:
        connection = open_connection(self._client)

        def ask(*command: Any) -> Any:
            connection.send_command(*command)  # type: ignore[no-untyped-call]
            return connection.read_response()

        try:
            prefixes = [part for prefix in self._prefixes() for part in ("PREFIX", prefix)]
            ask("CLIENT", "TRACKING", "ON", "REDIRECT", ask("CLIENT", "ID"), "BCAST", *prefixes)
            ask("SUBSCRIBE", INVALIDATIONS, *map(keys.freed_channel, self._queues if self._has_limits else ()))
            self._on_watching(True)
            self._on_arrival([])  # for jobs that came before
            self._take_all(connection)
        except ResponseError as error:
            _log.warning("action=watch_refused error=%s remedy=none_needed_queues_are_polled", error)
            self.stop()
        finally:
            self._on_watching(False)
            connection.disconnect()  # type: ignore[no-untyped-call]

    def _take_all(self, connection: AbstractConnection) -> None:
        num_silent = 0
        while not self.is_stopping:
            if connection.can_read(POLL_SECONDS):
                num_silent = 0
                self._take(connection.read_response())
                continue
            num_silent += 1
            if num_silent == PING_POLLS:
                connection.send_command("PING")  # type: ignore[no-untyped-call]
            elif num_silent >= 2 * PING_POLLS:
                raise redis.TimeoutError("the server does not answer")

    def _prefixes(self) -> list[str]:
        """The watched key prefixes. None is a prefix of another: Redis refuses that."""
        prefixes = set(map(queue_key, self._queues)) | {SUSPENDED_KEY}
        prefixes |= {keys.turns_key(queue) for queue in self._queues}
        return sorted(one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes))

    def _take(self, message: Any) -> None:
        if message[0] != b"message":
            return  # the reply to a PING or SUBSCRIBE
        if message[1] != INVALIDATIONS.encode():
            self._on_arrival([])
            return
        changed = [key.decode(errors="replace") for key in message[2] or ()]
        if message[2] is None or any(map(self._is_ours, changed)):
            queues = [key.removeprefix(_QUEUE_PREFIX) for key in changed if key.startswith(_QUEUE_PREFIX)]
            self._on_arrival(list(filter(self._is_tenants, queues)))

    def _is_tenants(self, queue: str) -> bool:
        base, tenant = keys.split_tenant(queue)
        return tenant is not None and base in self._queues

    def _is_ours(self, key: str) -> bool:
        for prefix in (_QUEUE_PREFIX, keys.turns_key("")):
            if key.startswith(prefix):
                return keys.split_tenant(key.removeprefix(prefix))[0] in self._queues
        return key == SUSPENDED_KEY
