"""One sequence's place in its grammar: a pure function of the sequence's tokens, so that a replay comes to it again.

Owns what may follow and what must: forced tokens are taken as soon as they are known, without a forward, and so is the
end of sequence once the grammar admits nothing else. Knows nothing of scheduling or of the device.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.field_types import shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher


_DEAD_END = "the grammar admits no token here, and not the end either: it has a dead end"
_NO_WAY_ON = "NoExtensionBias"  # as llguidance calls it
_FREE_SECONDS = 0.5
_SECONDS_PER_TOKEN = 0.002  # ten times what wide schemas take
_MAX_CHARGED_SECONDS = 0.1  # of one call: what took longer may have been stopped, with all of its process


@dataclass(slots=True)
class GrammarBudget:
    """What the sequences of one grammar may cost together, in time of the threads that follow it.

    Following a token takes some microseconds, in an ambiguous grammar up to half a second, and more with each: every
    such call holds up all sequences. Where it lies is not in the grammar's size, nor in any count that llguidance
    limits, so it is measured. Losing a charge to a race costs nothing.
    """

    seconds: float = 0.0
    num_tokens: int = 0

    def charge(self, began_at: float, num_tokens: int) -> None:
        """`began_at`: `time.perf_counter()`, which is read in 50 ns; the thread's own CPU time takes 750."""
        self.seconds += min(time.perf_counter() - began_at, _MAX_CHARGED_SECONDS)
        self.num_tokens += num_tokens

    @property
    def is_overdrawn(self) -> bool:
        return self.seconds > _FREE_SECONDS + _SECONDS_PER_TOKEN * self.num_tokens

    @property
    def reason(self) -> str:
        return (
            f"the grammar takes too long to follow, {self.seconds:.1f} s for {self.num_tokens} tokens: "
            "say less in two ways (rules that derive nothing, or the same text differently)"
        )


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
        self.llguidance = matcher
        self._eos_token_ids = eos_token_ids
        self._budget = budget if budget is not None else GrammarBudget()
        self._takes_forced = takes_forced
        self._forced: deque[int] = deque()  # what must follow, consumed by the matcher and not yet by the sequence
        self.error: str | None = None

    def start(self, output_token_ids: Sequence[int]) -> list[int]:
        """Replay the output so far, as it came about, and return what must follow it (see `accept`)."""
        began_at = time.perf_counter()
        self._force()
        self._charge(began_at, 0)
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
        """
        if self._forced:
            return token_id == self._forced[0]
        began_at = time.perf_counter()
        is_admitted = self.llguidance.validate_tokens([token_id]) == 1
        self._charge(began_at, 0)
        return is_admitted

    @property
    def next_forced(self) -> int | None:
        """The only token that may be sampled next, if it is known."""
        return self._forced[0] if self._forced else None

    def note_mask(self, *, is_empty: bool) -> None:
        """A mask of this was filled; `is_empty`: it admits no token."""
        if self.llguidance.is_error():
            self._fail()
        elif is_empty:
            self.error = _DEAD_END

    def _follow(self, token_id: int) -> None:
        began_at = time.perf_counter()
        self._step(token_id)
        self._charge(began_at, 1)

    def _charge(self, began_at: float, num_tokens: int) -> None:
        self._budget.charge(began_at, num_tokens)
        if self._budget.is_overdrawn and self.error is None:
            self.error = self._budget.reason

    def _step(self, token_id: int) -> None:
        if self._forced:
            if token_id != self._forced.popleft():
                self.error = f"token {token_id} stands where the grammar forces another"
            return
        if token_id in self._eos_token_ids:
            return
        if self.llguidance.consume_token(token_id):
            self._force()
        else:
            self._fail()

    def _force(self) -> None:
        """Note all that must follow."""
        matcher = self.llguidance
        while not matcher.is_stopped() and (tokens := matcher.compute_ff_tokens()):
            self._forced.extend(tokens)
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
        taken = list(self._forced)
        self._forced.clear()
        return taken

    def _fail(self) -> None:
        reason = readable(self.llguidance.get_error())
        self.error = _DEAD_END if reason == _NO_WAY_ON else f"the grammar cannot go on: {shortened(reason)}"


def readable(reason: str) -> str:
    """llguidance's words without what is of use to its authors alone."""
    return reason.partition("\n<backtrace>")[0].removesuffix("\n<non-verbose/>")
