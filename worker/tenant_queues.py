"""Finds the tenants' queues of the queues that a worker serves, and makes them take turns.

Our own producers make a tenant's queue take turns when they enqueue. Plain RQ does not, nor for retries, scheduled jobs
and dependents. A worker that notices such a queue's jobs does it (`QueueWatch`); for those that go unnoticed, one
worker per second looks through the list of all of RQ's queues. To keep that list short, empty queues are removed from
it.
"""

from collections.abc import Sequence

import redis

from producer.contract import keys
from producer.rq_names import QUEUES_KEY, queue_key
from worker.scripts import Scripts

LOOK_SECONDS = 1.0  # at most, until an unnoticed tenant's queue has its first turn
LIST_SECONDS = 30.0
LOCK_MS = 900
LOCK_KEY = "promptmill:discovery"
MAX_QUEUES_A_CALL = 500
LOOK_AGAIN_SECONDS = 10.0  # after removing a queue, which RQ may have listed for a job to come


class TenantQueues:
    """`look` is called from one thread; `names` is thread-safe."""

    def __init__(self, client: redis.Redis, scripts: Scripts, *, queues: Sequence[str]) -> None:
        self._client = client
        self._scripts = scripts
        self._queues = frozenset(queues)
        self._listed_at: float | None = None
        self._names: list[str] = []
        self._taken_off: list[str] = []
        self._looks_again_at: float | None = None

    @property
    def names(self) -> list[str]:
        """The names of the tenants' queues, as of the last look."""
        return self._names

    def look(self, now: float) -> None:
        """Find new tenants' queues. `now`: monotonic seconds. Raises Redis's errors."""
        if self._looks_again_at is not None and now >= self._looks_again_at:
            self._update_list(self._taken_off)
            self._looks_again_at = None
        is_mine = bool(self._client.set(LOCK_KEY, 1, nx=True, px=LOCK_MS))
        if not is_mine and self._listed_at is not None and now - self._listed_at < LIST_SECONDS:
            return
        queues = self._list()
        self._names = sorted(name for name in queues if keys.split_tenant(name)[0] in self._queues)
        self._listed_at = now
        if is_mine:
            for start in range(0, len(queues), MAX_QUEUES_A_CALL):
                self._scripts.join_turns(self._client, queues=queues[start : start + MAX_QUEUES_A_CALL])

    def forget_idle(self, now: float) -> None:
        """Remove empty queues from RQ's list and from `names`. Called from the same thread as `look`."""
        self._taken_off = self._update_list(self._names)
        self._names = sorted(set(self._names).difference(self._taken_off))
        self._looks_again_at = now + LOOK_AGAIN_SECONDS

    def _update_list(self, names: Sequence[str]) -> list[str]:
        idle: list[str] = []
        for start in range(0, len(names), MAX_QUEUES_A_CALL):
            idle += self._scripts.list_queues(self._client, queues=names[start : start + MAX_QUEUES_A_CALL])
        return idle

    def _list(self) -> list[str]:
        members = (key.decode(errors="replace") for key in self._client.sscan_iter(QUEUES_KEY, count=1000))
        names = {member.removeprefix(queue_key("")) for member in members}
        return [name for name in names if keys.split_tenant(name)[1] is not None]
