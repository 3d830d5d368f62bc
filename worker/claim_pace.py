"""Decides when a worker claims jobs: at once when it is told of one, else every few milliseconds.

Knows neither Redis nor jobs.
"""

from collections import deque
from collections.abc import Callable, Sequence

IDLE_SECONDS = 0.02  # between claims from empty queues, while arrivals are not reported
BUSY_SECONDS = 0.05  # the same, while jobs are held
WATCHED_SECONDS = 1.0  # while they are: messages may be lost, and a tenant's limit may allow more jobs again
MAX_HEARD_OF = 1000  # queues between two claims
MIN_SECONDS = 0.02  # between claims, however often arrivals are reported: most are of claims


class ClaimPace:
    """`note_arrival` and `set_watched` are thread-safe; everything else is for the claiming thread. `now`: monotonic
    seconds."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` ends the wait of the claiming thread."""
        self._wake = wake
        self._has_arrivals = False
        self._heard_of: deque[str] = deque(maxlen=MAX_HEARD_OF)
        self._looked_at = self._look_at = 0.0
        self._is_watched = False

    def note_arrival(self, queues: Sequence[str] = ()) -> None:
        """Note that there may be jobs to claim. Wakes the claiming thread once until its next claim.

        `queues`: the jobs' queues that the claiming thread would not look at by itself.
        """
        self._heard_of.extend(queues)
        if not self._has_arrivals:
            self._has_arrivals = True
            self._wake()

    def set_watched(self, is_watched: bool) -> None:
        """Set whether `note_arrival` is called from now on."""
        if is_watched != self._is_watched:
            self._is_watched = is_watched
            self.note_arrival()  # the pace changes

    def seconds_until_due(self, now: float) -> float:
        at = min(self._look_at, self._looked_at + MIN_SECONDS) if self._has_arrivals else self._look_at
        return max(0.0, at - now)

    def begin(self) -> list[str]:
        """Begin a claim, which may miss jobs that arrive from now on. It stays due until `end`.

        Returns the queues of the arrivals since the last claim.
        """
        self._has_arrivals = False
        self._look_at = 0.0
        num_queues = len(self._heard_of)  # later arrivals are for the next claim
        return list(dict.fromkeys(self._heard_of.popleft() for _ in range(num_queues)))

    def end(self, now: float, *, may_have_more: bool, is_busy: bool) -> None:
        """End a claim. `may_have_more`: it returned as many jobs as it asked for. `is_busy`: whether jobs are held."""
        self._looked_at = now
        if may_have_more:
            self._look_at = now
        elif self._is_watched:
            self._look_at = now + WATCHED_SECONDS
        else:
            self._look_at = now + (BUSY_SECONDS if is_busy else IDLE_SECONDS)
