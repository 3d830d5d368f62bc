"""Which tokens each slot's sequence holds, and how often its output does: what penalties are computed from.

Sparse: one list of distinct tokens a slot. It follows the token table, from which it can be made anew at any time, so
that a preempted or resumed sequence counts as if it had never stopped. Knows nothing of what the counts are for.
"""

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The big arrays cost memory only where they are touched."""

    def __init__(self, token_ids: NDArray[np.int32]) -> None:
        """`token_ids`: the slots' token table, int32 `[num_slots, max_len]`; read when counts are asked for."""
        self._token_ids = token_ids
        self._ids = np.zeros_like(token_ids)  # of each slot: its distinct tokens
        self._counts = np.zeros_like(token_ids)  # how often the output holds each
        self._num_ids = np.zeros(len(token_ids), np.int64)
        self._num_counted = np.zeros(len(token_ids), np.int64)  # leading tokens of the sequence taken in

    def open(self, slot: int, *, num_prompt_tokens: int, num_tokens: int, with_prompt: bool) -> None:
        """Begin with the tokens that a slot's sequence has; `with_prompt`: list the prompt's tokens as well."""
        tokens = self._token_ids[slot, :num_tokens]
        ids, counts = np.unique(tokens[num_prompt_tokens:], return_counts=True)
        if with_prompt:
            others = np.setdiff1d(tokens[:num_prompt_tokens], ids)
            ids, counts = np.concatenate((ids, others)), np.concatenate((counts, np.zeros(len(others), np.int64)))
        self._ids[slot, : len(ids)] = ids
        self._counts[slot, : len(ids)] = counts
        self._num_ids[slot] = len(ids)
        self._num_counted[slot] = num_tokens

    def advance(self, slots: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> None:
        """Take in what the slots' sequences were given up to `num_tokens`, int64 like slots: of a decode, one token."""
        while len(behind := slots[self._num_counted[slots] < num_tokens]):
            self._add(behind, self._token_ids[behind, self._num_counted[behind]])
            self._num_counted[behind] += 1

    def entries(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """For all tokens of some slots: the slot's place among `slots`, the token, its count. `[num_entries]` each."""
        num_ids = self._num_ids[slots]
        owners = np.repeat(np.arange(len(slots)), num_ids)
        shift = slots * self._ids.shape[1] - (np.cumsum(num_ids) - num_ids)
        places = np.arange(len(owners)) + shift[owners]
        return (
            owners,
            self._ids.reshape(-1)[places].astype(np.int64),
            self._counts.reshape(-1)[places].astype(np.float32),
        )

    def _add(self, slots: NDArray[np.int64], token_ids: NDArray[np.int32]) -> None:
        """One more token of the output of each slot; every slot stands here once."""
        num_ids = self._num_ids[slots]
        width = int(num_ids.max())
        is_same = self._ids[slots, :width] == token_ids[:, None]
        is_same &= np.arange(width) < num_ids[:, None]
        is_known = is_same.any(axis=1)
        places = np.where(is_known, is_same.argmax(axis=1) if width else 0, num_ids)
        self._ids[slots, places] = token_ids
        self._counts[slots, places] = np.where(is_known, self._counts[slots, places] + 1, 1)
        self._num_ids[slots] = num_ids + ~is_known
