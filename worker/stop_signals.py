"""SIGTERM, SIGINT and SIGHUP: how the process ends, and that it does end in time."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from worker.held_signals import ending_signals

MAX_STOP_SECONDS = 1.8  # from the signal that asks for a hand-over to the end of the process

_log = logging.getLogger(__name__)


class StopSignals:
    """While nothing is served, a signal ends the process (SystemExit); then it calls `on_stop`.

    `num_polite` signals wait for what `on_stop` does; the last of them starts a watchdog that ends the process if that
    takes too long, and the next signal ends it at once. With two polite ones the watchdog starts `drain_seconds` after
    the first, if that is sooner. Does nothing outside the main thread, where no signals arrive.
    """

    def __init__(self, num_polite: int, *, drain_seconds: float | None = None) -> None:
        self._num_polite = num_polite
        self._drain_seconds = drain_seconds
        self._num_received = 0
        self._on_stop: Callable[[], None] | None = None
        self._holds_jobs: Callable[[], bool] = lambda: False
        self._saved: dict[signal.Signals, Any] = {}
        self._watching = threading.Event()
        self._left = threading.Event()

    def serve(self, on_stop: Callable[[], None], holds_jobs: Callable[[], bool]) -> None:
        """From now on signals call `on_stop`. Where nothing is held an end by the watchdog is an orderly one, too."""
        self._on_stop, self._holds_jobs = on_stop, holds_jobs

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ending_signals():
                self._saved[number] = signal.signal(number, self._receive)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._saved.items():  # first: a handler that sets an event must not meet us inside it
            signal.signal(number, handler)
        self._left.set()
        self._watching.set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._on_stop is None:
            raise SystemExit(0)
        self._num_received += 1
        if self._num_received > self._num_polite:
            self._exit_now()
        if self._num_received == self._num_polite:
            self._watching.set()
        elif self._drain_seconds is not None:
            drained = threading.Timer(self._drain_seconds, self._watching.set)
            drained.daemon = True
            drained.start()
        self._on_stop()

    def _watch(self) -> None:
        self._watching.wait()
        if not self._left.wait(MAX_STOP_SECONDS):
            _log.error("action=stop_forced holds_jobs=%s", self._holds_jobs())
            self._exit_now()

    def _exit_now(self) -> None:
        os._exit(1 if self._holds_jobs() else 0)
