"""Callables that other threads post for the loop's thread to run."""

from collections.abc import Callable
from queue import Empty, SimpleQueue

Event = Callable[[], None]


class EventQueue:
    """`post` is thread-safe, and safe in a signal handler; `run` is for one thread."""

    def __init__(self) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()

    def post(self, event: Event) -> None:
        self._events.put(event)

    def wake(self) -> None:
        """End the wait of `run`."""
        self._events.put(_nothing)

    def run(self, wait_seconds: float) -> None:
        """Run the queued callables; if there are none, wait for the first one."""
        try:
            event = self._events.get(timeout=wait_seconds) if wait_seconds > 0 else self._events.get_nowait()
        except Empty:
            return
        num_others = self._events.qsize()  # those posted meanwhile wait for the next run
        event()
        for _ in range(num_others):
            self._events.get_nowait()()


def _nothing() -> None:
    return
