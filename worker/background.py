"""A few daemon threads for work that may take long or hang: process exit never waits for them."""

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_log = logging.getLogger(__name__)


class BackgroundThreads:
    """Runs tasks in the order they came, several at once. A task that raises is logged."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def stop(self, timeout_seconds: float) -> None:
        """Let the threads end after what is queued; threads that hang are left behind."""
        end = time.monotonic() + timeout_seconds
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # of any type: the thread serves the other tasks, too
                _log.exception("action=background_task_failed")
