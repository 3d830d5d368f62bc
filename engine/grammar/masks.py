"""Which tokens may come next, as bits: filled only where a token has to be drawn from what is left.

A mask costs up to a millisecond (more where a grammar is ambiguous, for which its account pays), asking a grammar about
one token some microseconds. Where a row's token is the largest score of all, and the grammar admits it, it is the
largest among the admitted ones too: the row needs no mask. So these rows are sampled first and judged then, and the
mask is filled for those alone whose token is refused; they draw again, from the same logits with the same noise. Which
way a row goes depends on its request alone.

top-k, top-p and min-p keep what is likely among the admitted tokens, so rows with such a filter need their masks first.
These are filled on a thread of their own while the device computes.

Owns who fills which. Knows nothing of logits.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.grammar.matcher import WORD_BITS, GrammarMatcher

_MAX_THREADS = max(1, min(32, (os.cpu_count() or 1) * 4 // 5))  # as many as llguidance's own filler has
_MIN_MASKS = 4  # of a thread: it takes some microseconds to be heard of


@dataclass(frozen=True, slots=True, eq=False)
class RowMasks:
    """The masks of some rows of a step."""

    rows: NDArray[np.int64]  # [num_masks], of the sampled rows
    bits: NDArray[np.int32]  # [num_masks, ceil(vocab / 32)]


class TokenMasks:
    """Of the sampled rows of one step. Their matchers are not to be touched before the step is sampled."""

    def __init__(
        self,
        filler: "MaskFiller",
        rows: NDArray[np.int64],
        matchers: Sequence[GrammarMatcher],
        has_filter: NDArray[np.bool_],
    ) -> None:
        """rows: the sampled rows with a grammar `[num_constrained]`; has_filter: as long, whether top-k, top-p or min-p
        is on. Begins to fill what these rows need.
        """
        self._filler = filler
        self._judged = [(row, matchers[i]) for i, row in enumerate(rows.tolist()) if not has_filter[i]]
        self._filtered = rows[has_filter]
        self._bits: Future[NDArray[np.int32]] | None = None
        if len(self._filtered):
            self._bits = filler.start([matchers[i] for i in has_filter.nonzero()[0].tolist()])

    def before_sampling(self) -> RowMasks | None:
        """What hides tokens from the rows with filters, once it is filled; None without such rows."""
        return None if self._bits is None else RowMasks(self._filtered, self._bits.result())

    def after_sampling(self, token_ids: NDArray[np.int64]) -> RowMasks | None:
        """The masks of the rows that are to be sampled again; None if every token stands.

        token_ids: what was drawn, `[num_sampled]`, out of all tokens in the rows without filters.
        """
        refused = [(row, matcher) for row, matcher in self._judged if not matcher.admits(int(token_ids[row]))]
        if not refused:
            return None
        rows = np.array([row for row, _ in refused], np.int64)
        return RowMasks(rows, self._filler.fill([matcher for _, matcher in refused]))


class MaskFiller:
    """Fills one step's masks at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // WORD_BITS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._others = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="grammar-masks-beside")

    def start(self, matchers: Sequence[GrammarMatcher]) -> Future[NDArray[np.int32]]:
        """Begin to fill; the matchers are not to be touched until it is done."""
        return self._thread.submit(self.fill, matchers)

    def fill(self, matchers: Sequence[GrammarMatcher]) -> NDArray[np.int32]:
        """int32 `[num_matchers, ceil(vocab / 32)]`. One that fails gets a mask of ones. Each is filled, and charged
        for it, on one thread."""
        bits = np.zeros((len(matchers), self._num_words), np.int32)
        num_threads = min(-(-len(matchers) // _MIN_MASKS), _MAX_THREADS)
        beside = [self._others.submit(_fill, matchers, bits, i, num_threads) for i in range(1, num_threads)]
        _fill(matchers, bits, 0, num_threads)
        for other in beside:
            other.result()
        return bits


def _fill(matchers: Sequence[GrammarMatcher], bits: NDArray[np.int32], start: int, stride: int) -> None:
    for row in range(start, len(matchers), stride):
        matchers[row].fill_mask(bits[row])
