"""Which tokens may come next, as bits, filled on threads of their own while the device computes.

Owns the layout: one row of int32 words a constrained row, bit i of word w for token 32 w + i. llguidance fills them
without the interpreter's lock.
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
class TokenMasks:
    """The masks of some rows of a step."""

    rows: NDArray[np.int64]  # [num_masks], of the sampled rows
    bits: "Future[NDArray[np.int32]]"  # [num_masks, ceil(vocab / 32)]


class MaskFiller:
    """Fills one step's masks at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // WORD_BITS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._executor: LLExecutor | None = None

    def start(self, rows: NDArray[np.int64], matchers: Sequence[GrammarMatcher]) -> TokenMasks:
        """Begin to fill; the matchers are not to be touched until `bits` is done."""
        return TokenMasks(rows, self._thread.submit(self._fill, matchers))

    def _fill(self, matchers: Sequence[GrammarMatcher]) -> NDArray[np.int32]:
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
