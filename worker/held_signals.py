"""Delays signals while something is started, so that none comes before its end is taken care of."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def ending_signals() -> list[signal.Signals]:
    """The signals that end this process; without SIGHUP under `nohup`."""
    is_hup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_hup_ignored else [signal.SIGHUP])]


@contextmanager
def held_signals() -> Iterator[None]:
    """Delay ending signals until the block ends; then the previous handlers get them.

    Does nothing outside the main thread, where no signals arrive. They are caught rather than masked: a process that is
    started meanwhile would inherit a mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number)) for number in ending_signals()
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came in received:
            signal.raise_signal(came)
