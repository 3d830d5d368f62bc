"""One sequence's place in its grammar: a pure function of the sequence's tokens, so that a replay comes to it again.

Owns what may follow and what must: forced tokens are taken as soon as they are known, without a forward, and so is the
end of sequence once the grammar admits nothing else. Knows nothing of scheduling or of the device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.field_types import shortened
from engine.grammar.budget import GrammarBudget, now

if TYPE_CHECKING:
    from llguidance import LLMatcher

_Result = TypeVar("_Result")

WORD_BITS = 32  # of a mask
MAX_FORCED_TOKENS = 4096  # at once: the steps wait while they are found, 2 to 15 µs for each
MAX_FORCED_BYTES = (
    16 * MAX_FORCED_TOKENS
)  # more are not made into tokens, which may take 40 times what finding them does
_DEAD_END = "the grammar admits no token here, and not the end either: it has a dead end"
_NO_WAY_ON = "NoExtensionBias"  # as llguidance calls it


class GrammarMatcher:
    """Behind llguidance's matcher. Not thread-safe; never used while a mask of it is being filled.

    `takes_forced` false: forced tokens are sampled one by one, each under a mask that leaves nothing else, because
    somebody wants their log-probabilities, or the prompt's, which an output without a forward would leave uncomputed.
    The tokens are the same.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        eos_token_ids: tuple[int, ...],
        *,
        takes_forced: bool = True,
        budget: GrammarBudget | None = None,
    ) -> None:
        self._llguidance = matcher
        self._eos_token_ids = eos_token_ids
        self._budget = budget if budget is not None else GrammarBudget()
        self._takes_forced = takes_forced
        self._forced: deque[int] = deque()  # what must follow, consumed by the matcher and not yet by the sequence
        self.error: str | None = None
        self.is_too_costly = False  # the `error` is what the grammar costs, not what it says

    def start(self, output_token_ids: Sequence[int]) -> list[int]:
        """Replay the output so far, as it came about, and return what must follow it (see `accept`)."""
        self._run(self._force, num_tokens=0)
        for token_id in output_token_ids:
            if self.error is not None:
                break
            self._follow(token_id)
        return self._take_forced()

    def accept(self, token_id: int) -> list[int]:
        """Go on with a token that was sampled; return the tokens that must follow and were not sampled.

        A token that the grammar does not admit, or a grammar that has outgrown its limits, sets `error`.
        """
        self._follow(token_id)
        return self._take_forced()

    def admits(self, token_id: int) -> bool:
        """Whether this token may come next, if it is the model's own choice. Nothing changes.

        False for a special token that ends the sequence and stands in the grammar at once, though its mask holds it.
        Where there is an `error`, or will be, any token will do.
        """
        if self._forced:
            return token_id == self._forced[0]
        is_admitted = self._run(lambda: self._llguidance.validate_tokens([token_id]) == 1, num_tokens=0)
        return is_admitted is not False

    def fill_mask(self, bits: NDArray[np.int32]) -> None:
        """Mark the tokens that may come next; all of them, where there is an `error`.

        bits: a row of zeros, `[ceil(vocab / 32)]`, bit i of word w for token 32 w + i. Lets go of the
        interpreter's lock.
        """
        if self._forced:
            bits[self._forced[0] // WORD_BITS] = np.uint32(1 << self._forced[0] % WORD_BITS).astype(np.int32)
        else:
            self._run(lambda: self._fill_open(bits), num_tokens=0)
            if self.error is not None:
                bits[:] = -1  # it fails with the grammar's reason, not for logits without a maximum

    def _fill_open(self, bits: NDArray[np.int32]) -> None:
        self._llguidance.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._llguidance.is_error():
            self._fail()
        elif not bits.any():
            self.error = _DEAD_END

    @property
    def has_ended(self) -> bool:
        """Whether nothing may follow any more: all is said, or there is an `error`."""
        return self.error is not None or (not self._forced and self._llguidance.is_stopped())

    def _follow(self, token_id: int) -> None:
        self._run(lambda: self._step(token_id), num_tokens=1)

    def _run(self, call: Callable[[], _Result], *, num_tokens: int) -> _Result | None:
        """Have llguidance do something and charge what it costs. None: there is an `error`."""
        if self._budget.is_exhausted:
            self._refuse(self._budget.reason)
        if self.error is not None:
            return None
        began = now()
        try:
            return call()
        except BaseException as error:  # a panic in llguidance is no `Exception`, and costs this sequence alone
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self.error = f"the grammar cannot go on: {shortened(str(error))}"
            return None
        finally:
            if not self._budget.charge_since(began, num_tokens):
                self._refuse(self._budget.reason)

    def _step(self, token_id: int) -> None:
        if self._forced:
            if token_id != self._forced.popleft():
                self.error = f"token {token_id} stands where the grammar forces another"
            return
        if token_id in self._eos_token_ids:
            return
        if self._llguidance.consume_token(token_id):
            self._force()
        else:
            self._fail()

    def _force(self) -> None:
        """Note all that must follow."""
        matcher = self._llguidance
        while not matcher.is_stopped() and (num_bytes := len(matcher.compute_ff_bytes())):
            if num_bytes > MAX_FORCED_BYTES:
                return self._refuse_forced(f"{num_bytes:,} bytes, more than {MAX_FORCED_BYTES:,}")
            if not (tokens := matcher.compute_ff_tokens()):  # what is forced may go on as one token or another
                break
            self._forced.extend(tokens)
            if len(self._forced) > MAX_FORCED_TOKENS:
                return self._refuse_forced(f"{len(self._forced):,} tokens, more than {MAX_FORCED_TOKENS:,}")
            matcher.consume_tokens(tokens)
        if matcher.is_error():
            self._fail()
        elif matcher.is_stopped():
            if matcher.is_accepting():
                self._forced.append(self._eos_token_ids[0])
            else:
                self.error = f"the grammar stopped: {matcher.stop_reason()}"

    def _take_forced(self) -> list[int]:
        if not self._takes_forced:
            return []
        taken = [] if self.error is not None else list(self._forced)
        self._forced.clear()
        return taken

    def _refuse(self, reason: str) -> None:
        if self.error is None:
            self.error, self.is_too_costly = reason, True

    def _refuse_forced(self, how_much: str) -> None:
        self._refuse(f"the grammar forces {how_much} at once: let it force less text")

    def _fail(self) -> None:
        reason = readable(self._llguidance.get_error())
        self.error = _DEAD_END if reason == _NO_WAY_ON else f"the grammar cannot go on: {shortened(reason)}"


def readable(reason: str) -> str:
    """llguidance's words without what is of use to its authors alone."""
    return reason.partition("\n<backtrace>")[0].removesuffix("\n<non-verbose/>")
