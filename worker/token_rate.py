"""Measures a worker's current output in tokens per second."""

from collections import deque

WINDOW_SECONDS = 10.0


class TokenRate:
    """Tokens per second over the last `WINDOW_SECONDS`. Times are seconds of one monotonic clock. Not thread-safe."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._num_tokens = 0

    def add(self, now: float, num_tokens: int) -> None:
        self._samples.append((now, num_tokens))
        self._num_tokens += num_tokens
        self._forget(now)

    def per_second(self, now: float) -> float:
        """0 after a whole window without output."""
        self._forget(now)
        if not self._samples:
            return 0.0
        # A worker that has just started is measured over its own time, but at least a second.
        elapsed = max(1.0, now - self._samples[0][0])
        return self._num_tokens / elapsed

    def _forget(self, now: float) -> None:
        while self._samples and self._samples[0][0] < now - WINDOW_SECONDS:
            self._num_tokens -= self._samples.popleft()[1]
