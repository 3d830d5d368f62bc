"""Redis' time, without asking each time: deadlines are held against it, so that they mean the same on every worker."""

import time


class RedisClock:
    """Set by the heartbeat's thread, read by the loop's. Until Redis has said its time this machine's is taken for it.

    It lags by as long as the last reply took to come.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()  # seconds, of the monotonic clock

    def set(self, epoch_seconds: float) -> None:
        self._ahead = epoch_seconds - time.monotonic()

    def now(self) -> float:
        """Epoch seconds."""
        return time.monotonic() + self._ahead
