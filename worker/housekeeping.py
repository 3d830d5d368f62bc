"""Periodic tasks beside the loop. One that fails is tried again at its next turn."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.redis_client import REDIS_AWAY

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Chore:
    name: str
    interval_seconds: float
    run: Callable[[float], None]
    """Given the time: monotonic seconds."""
    due_at: float = 0.0


class Housekeeper:
    """A thread with periodic tasks."""

    def __init__(self, chores: Sequence[Chore], *, name: str = "housekeeping") -> None:
        self._chores = list(chores)
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Start no more tasks."""
        self._is_stopping.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the current task; one that hangs is left behind."""
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            for chore in self._chores:
                now = time.monotonic()
                if chore.due_at <= now and not self._is_stopping.is_set():
                    chore.due_at = now + chore.interval_seconds
                    self._do(chore, now)
            pause = min(chore.due_at for chore in self._chores) - time.monotonic()
            self._is_stopping.wait(max(0.0, pause))

    def _do(self, chore: Chore, now: float) -> None:
        try:
            chore.run(now)
        except REDIS_AWAY as error:
            _log.warning("action=chore_delayed chore=%s error=%s", chore.name, error)
        except Exception:  # of any type: the other tasks go on
            _log.exception("action=chore_failed chore=%s", chore.name)
