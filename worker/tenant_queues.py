"""The tenants' queues of the queues that a worker serves: finds them, and sees to it that they take turns.

Our own producers let a tenant's queue take turns as they enqueue. Plain RQ does not (nor does it for retries, scheduled
jobs and dependents). A worker that hears of such a queue's jobs sees to it (`QueueWatch`); for those that nobody hears
of, one worker a second looks through the list of all of RQ's queues. So that this does not grow with every tenant there
ever was, queues that hold nothing any more are taken off that list.
"""

from collections.abc import Sequence

import redis

from producer.contract import keys
from producer.rq_names import QUEUES_KEY, queue_key
from worker.scripts import Scripts

LOOK_SECONDS = 1.0  # how long a tenant of plain RQ waits at most for its first turn, where nobody hears of it
LIST_SECONDS = 30.0
LOCK_MS = 900
LOCK_KEY = "promptmill:discovery"
MAX_QUEUES_A_CALL = 500
LOOK_AGAIN_SECONDS = 10.0  # behind taking a queue off the list, which RQ may have put on it for a job that comes yet


class TenantQueues:
    """`look` on one thread; `names` from any."""

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
        """The queues of the served queues' tenants, as of the last look."""
        return self._names

    def look(self, now: float) -> None:
        """`now`: monotonic seconds. Raises what Redis raises."""
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
        """Take those that hold nothing off RQ's list, and out of `names`. As `look`, and on its thread."""
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
