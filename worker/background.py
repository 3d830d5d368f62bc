"""A few daemon threads for work that may take long or hang: process exit never waits for them."""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

Task = Callable[[], None]


class BackgroundThreads:
    """Runs tasks in the order in which they are submitted or fall due, several at once. A task's exception is logged.

    A task that needs a retry submits itself again instead of sleeping, which would block a thread.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: list[tuple[float, int, Task]] = []  # a heap, by due time
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task, *, after_seconds: float = 0.0) -> None:
        with self._changed:
            heapq.heappush(self._tasks, (time.monotonic() + after_seconds, next(self._numbers), task))
            self._changed.notify()

    def stop(self, timeout_seconds: float) -> None:
        """Let the threads end after the queued tasks, which run without waiting for their due time; threads that hang
        are left behind."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except Exception:  # of any type: the thread is needed for other tasks
                _log.exception("action=background_task_failed")

    def _next(self) -> Task | None:
        with self._changed:
            while True:
                due_in = self._tasks[0][0] - time.monotonic() if self._tasks else None
                if due_in is not None and (due_in <= 0 or self._is_stopping):
                    _, _, task = heapq.heappop(self._tasks)
                    if self._tasks:
                        self._changed.notify()  # another thread has to wait for the next task
                    return task
                if self._is_stopping:
                    return None
                self._changed.wait(due_in)
