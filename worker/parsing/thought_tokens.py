"""How many of one choice's tokens are of its thought: all up to the marker that closes it, the markers included.

Told from the bytes that each token adds, and so by the tokens alone: the text comes for several of them together, and
is held back where it may become a stop string.
"""

from collections.abc import Mapping, Sequence

from worker.parsing.reasoning_parser import CLOSES

_CLOSES = CLOSES.encode()


class ThoughtTokens:
    """Counts them as they come."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        """`token_bytes`: of each token, with the markers' own."""
        self._token_bytes = token_bytes
        self._tail = b""  # that may become the marker
        self._num_tokens = 0
        self._num_told = 0
        self._is_closed = False

    def push(self, token_ids: Sequence[int], *, has_thought: bool | None) -> int:
        """How many more are known to be of the thought. `has_thought`: None, where that is not known yet."""
        if has_thought is False:
            return 0
        for token_id in token_ids:
            if self._is_closed:
                break
            self._num_tokens += 1
            data = self._tail + self._token_bytes[token_id]
            self._is_closed = _CLOSES in data
            self._tail = data[-len(_CLOSES) + 1 :]
        if has_thought is None:
            return 0
        num_new, self._num_told = self._num_tokens - self._num_told, self._num_tokens
        return num_new
