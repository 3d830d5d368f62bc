"""A thread that listens to Redis for as long as the worker lives, and reconnects after errors."""

import logging
import threading
from abc import ABC, abstractmethod

from worker.redis_client import REDIS_AWAY

RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


class ListenerThread(ABC):
    """Calls `_listen` again and again until it is told to stop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Thread-safe, also on the thread itself; does not wait."""
        self._is_stopping.set()

    def _run(self) -> None:
        while not self.is_stopping:
            try:
                self._listen()
            except Exception as error:  # of any type: it must go on listening
                if not self.is_stopping:  # else the connection may have been closed on purpose
                    unknown = None if isinstance(error, REDIS_AWAY) else error
                    _log.warning("action=%s_lost error=%s", self._name, error, exc_info=unknown)
            self._is_stopping.wait(RETRY_SECONDS)

    @abstractmethod
    def _listen(self) -> None:
        """Listen until the connection fails or `is_stopping`."""
