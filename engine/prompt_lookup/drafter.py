"""Guesses what one sequence says next from what it said or read before: prompt lookup decoding (Saxena, 2023).

The last three tokens are looked up among all earlier ones, and what followed them there is the draft. Owns the index
and how long and how often a sequence is guessed; the output does not depend on either. Knows nothing of steps, of who
else runs or of what a guess costs.
"""

import numpy as np
from numpy.typing import NDArray

FIRST_LENGTH, MAX_DRAFT_TOKENS = 3, 15
_ID_BITS = 21  # of a token id in a key; no vocabulary is that large
_KEY_MASK = (1 << 3 * _ID_BITS) - 1  # a key holds the last three tokens
_MANY = 32  # tokens from which on array operations are faster than a loop: 0.1 µs a token, and 10 µs to begin with
_FIRST_PAUSE, _MAX_PAUSE = 4, 64  # steps
_NOTHING = np.zeros(0, np.int32)


class Drafter:
    """Of one sequence. Reads its tokens when it is asked, so that nothing is to be told of them."""

    __slots__ = ("_followers", "_key", "_length", "_num_read", "_num_to_skip", "_pause", "_start")

    def __init__(self) -> None:
        self._followers: dict[int, int] = {}  # three tokens → where the token after their last occurrence stands
        self._num_read = 0  # leading positions in the index
        self._key = _KEY_MASK  # of the last three tokens in the index; before the first stand ids that there are not
        self._start: int | None = None  # where that key's follower stood before
        self._length = FIRST_LENGTH
        self._pause = 0  # steps
        self._num_to_skip = 0

    def draft(self, token_ids: NDArray[np.int32], max_tokens: int) -> NDArray[np.int32]:
        """At most `max_tokens` tokens that may follow `token_ids` `[num_tokens]`, all of the sequence's; often none."""
        if self._num_to_skip:
            self._num_to_skip -= 1
            return _NOTHING
        self._read(token_ids)
        length = min(self._length, max_tokens)
        if self._start is None or length < 1:
            return _NOTHING
        # Where less follows than is wanted, the sequence repeats itself, and is guessed to go on doing so.
        return np.resize(token_ids[self._start :], length)

    def note(self, num_drafted: int, num_accepted: int, *, has_paid: bool) -> None:
        """What came of a draft: longer ones while they come true, fewer and fewer while they do not pay."""
        if num_accepted == num_drafted:
            self._length = min(2 * self._length, MAX_DRAFT_TOKENS)
        else:
            self._length = max(num_accepted + 1, FIRST_LENGTH)
        self._pause = 0 if has_paid else min(max(_FIRST_PAUSE, 4 * self._pause), _MAX_PAUSE)
        self._num_to_skip = self._pause

    def _read(self, token_ids: NDArray[np.int32]) -> None:
        """Take in what is new: mostly one token, for which plain integers are ten times faster than arrays."""
        if len(token_ids) - self._num_read > _MANY:
            self._read_many(token_ids[:-1])
        followers, key, start = self._followers, self._key, self._start
        for follower, token_id in enumerate(token_ids[self._num_read :].tolist(), self._num_read + 1):
            key = (key << _ID_BITS | token_id) & _KEY_MASK
            start = followers.get(key)
            followers[key] = follower
        self._num_read, self._key, self._start = len(token_ids), key, start

    def _read_many(self, token_ids: NDArray[np.int32]) -> None:
        first = max(self._num_read, 2)  # the first token with two before it
        ids = token_ids[first - 2 :].astype(np.int64)
        keys = ((ids[:-2] << 2 * _ID_BITS) + (ids[1:-1] << _ID_BITS) + ids[2:]).tolist()
        self._followers.update(zip(keys, range(first + 1, len(token_ids) + 1), strict=True))
        self._num_read, self._key = len(token_ids), keys[-1]
