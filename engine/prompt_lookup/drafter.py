"""Guesses what one sequence says next from what it said or read before: prompt lookup decoding (Saxena, 2023).

The last three tokens are looked up among all earlier ones, and what followed them there is the draft. Owns the index
and when a guess is worth its cost; the output does not depend on either. Knows nothing of steps or of who else runs.
"""

import numpy as np
from numpy.typing import NDArray

MAX_DRAFT_TOKENS = 15
_GRAM = 3  # tokens that must agree
_ID_BITS = 21  # of a token id in a key; no vocabulary is that large
_FIRST_LENGTH = 3
_MAX_PAUSE = 64  # steps. Where no guess ever comes true, one step in 64 carries one, at some tenths of a step's time
_FIRST_PAUSE = 4
_WORTHWHILE = (
    4  # a draft pays if one in so many of its tokens is accepted: a row more costs up to a fifth of a lone one
)


class Drafter:
    """Of one sequence. Reads its tokens when it is asked, so that nothing is to be told of them."""

    __slots__ = ("_followers", "_length", "_num_keys", "_num_to_skip", "_pause")

    def __init__(self) -> None:
        self._followers: dict[int, int] = {}  # three tokens → where the token after their last occurrence stands
        self._num_keys = 0  # leading positions in the index
        self._length = _FIRST_LENGTH
        self._pause = 0  # steps
        self._num_to_skip = 0

    def draft(self, token_ids: NDArray[np.int32], max_tokens: int) -> NDArray[np.int32]:
        """At most `max_tokens` tokens that may follow `token_ids` `[num_tokens]`, all of the sequence's; often none."""
        if self._num_to_skip:
            self._num_to_skip -= 1
            return token_ids[:0]
        length = min(self._length, max_tokens)
        num_tokens = len(token_ids)
        if length < 1 or num_tokens <= _GRAM:
            return token_ids[:0]
        self._index(token_ids)
        start = self._followers.get(int(_keys(token_ids[-_GRAM:])[0]))
        # Where less follows than is wanted, the sequence repeats itself, and is guessed to go on doing so.
        return token_ids[:0] if start is None else np.resize(token_ids[start:], length)

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """What came of a draft: longer ones while they come true, fewer and fewer while they do not."""
        if num_accepted == num_drafted:
            self._length = min(2 * self._length, MAX_DRAFT_TOKENS)
        else:
            self._length = max(num_accepted + 1, _FIRST_LENGTH)
        if num_accepted * _WORTHWHILE >= num_drafted:
            self._pause = 0
        else:
            self._pause = min(max(_FIRST_PAUSE, 4 * self._pause), _MAX_PAUSE)
        self._num_to_skip = self._pause

    def _index(self, token_ids: NDArray[np.int32]) -> None:
        """Take in every position that has a follower; later ones win."""
        num_keys = len(token_ids) - _GRAM
        new = _keys(token_ids[self._num_keys : -1]).tolist()
        self._followers.update(zip(new, range(self._num_keys + _GRAM, len(token_ids)), strict=True))
        self._num_keys = num_keys


def _keys(token_ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """One key for every three tokens in a row."""
    ids = token_ids.astype(np.int64)
    return (ids[:-2] << 2 * _ID_BITS) + (ids[1:-1] << _ID_BITS) + ids[2:]
