"""When a worker looks for jobs: as soon as it hears of one where it is told, every few milliseconds where it is not.

Knows neither Redis nor jobs.
"""

from collections import deque
from collections.abc import Callable, Sequence

IDLE_SECONDS = 0.02  # between looks at queues that were empty, while nobody tells of arrivals
BUSY_SECONDS = 0.05  # the same, while there is something to do
WATCHED_SECONDS = 1.0  # while somebody does: messages may be lost, and a seat for a tenant may come free elsewhere
MAX_HEARD_OF = 1000  # queues between two looks
MIN_SECONDS = 0.02  # between looks, however often arrivals are told of: most are claims, our own and other workers'


class ClaimPace:
    """`note_arrival` and `set_watched` are for any thread; everything else is for the one that claims. `now`: monotonic
    seconds."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` ends the wait of the thread that claims."""
        self._wake = wake
        self._has_arrivals = False
        self._heard_of: deque[str] = deque(maxlen=MAX_HEARD_OF)
        self._looked_at = self._look_at = 0.0
        self._is_watched = False

    def note_arrival(self, queues: Sequence[str] = ()) -> None:
        """There may be something to claim. Wakes once: a worker that is full hears of the others when it has room.

        `queues`: those that it lies on, as far as the one who claims would not find them by himself.
        """
        self._heard_of.extend(queues)
        if not self._has_arrivals:
            self._has_arrivals = True
            self._wake()

    def set_watched(self, is_watched: bool) -> None:
        """Whether somebody calls `note_arrival` from now on."""
        if is_watched != self._is_watched:
            self._is_watched = is_watched
            self.note_arrival()  # the pace changes

    def seconds_until_due(self, now: float) -> float:
        at = min(self._look_at, self._looked_at + MIN_SECONDS) if self._has_arrivals else self._look_at
        return max(0.0, at - now)

    def begin(self) -> list[str]:
        """A look begins: what arrives from now on, it may miss. One that does not come to its end is due again.

        Returns the queues of the arrivals since the last look.
        """
        self._has_arrivals = False
        self._look_at = 0.0
        num_queues = len(self._heard_of)  # whoever arrives meanwhile is for the next look
        return list(dict.fromkeys(self._heard_of.popleft() for _ in range(num_queues)))

    def end(self, now: float, *, may_have_more: bool, is_busy: bool) -> None:
        """`may_have_more`: as much was found as was asked for. `is_busy`: whether jobs are held."""
        self._looked_at = now
        if may_have_more:
            self._look_at = now
        elif self._is_watched:
            self._look_at = now + WATCHED_SECONDS
        else:
            self._look_at = now + (BUSY_SECONDS if is_busy else IDLE_SECONDS)
