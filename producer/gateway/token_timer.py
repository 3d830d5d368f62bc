"""How long a client waits for tokens: until the first one, and from one to the next."""

import time
from collections.abc import Callable


class TokenTimer:
    """For one response. `on_first` and `on_next` are called with seconds; an entry of several tokens counts once, with
    the seconds per token."""

    def __init__(self, on_first: Callable[[float], None], on_next: Callable[[float], None]) -> None:
        self._on_first = on_first
        self._on_next = on_next
        self._is_first = True
        self._last = time.perf_counter()

    def take(self, num_tokens: int) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._is_first:
            self._is_first = False
            self._on_first(seconds)
        else:
            self._on_next(seconds / num_tokens)
