"""Hears of jobs as they are enqueued, whoever does it: Redis tells which keys change, as for client-side caches.

Plain RQ and other languages push onto a list and tell nobody; a list can be waited for only by taking from it. So the
watch has Redis report every change of the served queues' keys, of their tenants' queues and of their turns. Where
tenants have limits, workers tell it of jobs of theirs that end, because that makes room. A server, or a proxy before
one, that cannot do that is asked every few milliseconds instead: see `ClaimPace`. Knows nothing of claims.
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
PING_POLLS = 10  # without a word, before the server is asked whether it is there; after as many more it is not
INVALIDATIONS = "__redis__:invalidate"  # the channel of the changes: Redis' own name

_QUEUE_PREFIX = queue_key("")

_log = logging.getLogger(__name__)


class QueueWatch(ListenerThread):
    """Callbacks run on the watch's thread."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        queues: Sequence[str],
        has_limits: bool,
        on_arrival: Callable[[list[str]], None],
        on_watching: Callable[[bool], None],
    ) -> None:
        """`has_limits`: whether tenants have limits. `on_arrival` is told of tenants' queues by name: plain RQ's do
        not take turns yet. `on_watching` is told whether arrivals are heard of."""
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
            self._on_arrival([])  # what came before
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
        """None begins with another: Redis refuses that."""
        prefixes = set(map(queue_key, self._queues)) | {SUSPENDED_KEY}
        prefixes |= {keys.turns_key(queue) for queue in self._queues}
        return sorted(one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes))

    def _take(self, message: Any) -> None:
        if message[0] != b"message":
            return  # the answer to a PING, or to SUBSCRIBE
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
