"""Which tokens may come next, as bits: filled only where a token has to be drawn from what is left.

A mask costs up to a millisecond, asking a grammar about one token some microseconds. Where a row's token is the largest
score of all, and the grammar admits it, it is the largest among the admitted ones too: the row needs no mask. So these
rows are sampled first and judged then, and the mask is filled for those alone whose token is refused; they draw again,
from the same logits with the same noise. Which way a row goes depends on its request alone.

top-k, top-p and min-p keep what is likely among the admitted tokens, so rows with such a filter need their masks first.
These are filled on a thread of their own while the device computes.

Owns the layout: one row of int32 words a constrained row, bit i of word w for token 32 w + i. llguidance fills them
without the interpreter's lock. Knows nothing of logits.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.grammar.matcher import GrammarMatcher

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

WORD_BITS = 32


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
        self._executor: LLExecutor | None = None

    def start(self, matchers: Sequence[GrammarMatcher]) -> "Future[NDArray[np.int32]]":
        """Begin to fill; the matchers are not to be touched until it is done."""
        return self._thread.submit(self.fill, matchers)

    def fill(self, matchers: Sequence[GrammarMatcher]) -> NDArray[np.int32]:
        """int32 `[num_matchers, ceil(vocab / 32)]`. A matcher that admits nothing is told, and gets a mask of ones."""
        bits = np.zeros((len(matchers), self._num_words), np.int32)
        open_matchers = []
        for row, matcher in enumerate(matchers):
            if (forced := matcher.next_forced) is None:
                open_matchers.append((matcher.llguidance, row))
            else:
                bits[row, forced // WORD_BITS] = np.uint32(1 << forced % WORD_BITS).astype(np.int32)
        if open_matchers:
            self._fill_open(open_matchers, bits)
        is_empty = np.logical_not(bits.any(axis=1))
        for row, matcher in enumerate(matchers):
            matcher.note_mask(is_empty=bool(is_empty[row]))
        bits[is_empty] = -1  # such a sequence fails, but with the grammar's reason, not for logits without a maximum
        return bits

    def _fill_open(self, matchers: list[tuple["LLMatcher", int]], bits: NDArray[np.int32]) -> None:
        import llguidance.numpy
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor()
        llguidance.numpy.fill_next_token_bitmask_par(self._executor, matchers, bits)
