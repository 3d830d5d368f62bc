"""How other threads speak to the loop's: by callables that it runs."""

from collections.abc import Callable
from queue import Empty, SimpleQueue

Event = Callable[[], None]


class EventQueue:
    """`post` from any thread, and in a signal handler; `run` on one."""

    def __init__(self) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()

    def post(self, event: Event) -> None:
        self._events.put(event)

    def wake(self) -> None:
        """End the wait of `run`."""
        self._events.put(_nothing)

    def run(self, wait_seconds: float) -> None:
        """Run what is there now; if nothing is, the first that comes in time."""
        try:
            event = self._events.get(timeout=wait_seconds) if wait_seconds > 0 else self._events.get_nowait()
        except Empty:
            return
        num_others = self._events.qsize()  # what they post waits for the next run
        event()
        for _ in range(num_others):
            self._events.get_nowait()()


def _nothing() -> None:
    return
