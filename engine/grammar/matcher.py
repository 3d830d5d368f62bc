"""One sequence's place in its grammar: a pure function of the sequence's tokens, so that a replay comes to it again.

Owns what may follow and what must: forced tokens are taken as soon as they are known, without a forward, and so is the
end of sequence once the grammar admits nothing else. Knows nothing of scheduling or of the device.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.field_types import shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarMatcher:
    """Behind llguidance's matcher. Not thread-safe; never used while a mask of it is being filled.

    `takes_forced` false: forced tokens are sampled one by one, each under a mask that leaves nothing else, because
    somebody wants their log-probabilities, or the prompt's, which an output without a forward would leave uncomputed.
    The tokens are the same.
    """

    def __init__(self, matcher: "LLMatcher", eos_token_ids: tuple[int, ...], *, takes_forced: bool = True) -> None:
        self.llguidance = matcher
        self._eos_token_ids = eos_token_ids
        self._takes_forced = takes_forced
        self._forced: deque[int] = deque()  # what must follow, consumed by the matcher and not yet by the sequence
        self.error: str | None = None

    def start(self, output_token_ids: Sequence[int]) -> list[int]:
        """Replay the output so far, as it came about, and return what must follow it (see `accept`)."""
        self._force()
        for token_id in output_token_ids:
            if self.error is not None:
                break
            self._step(token_id)
        return self._take_forced()

    def accept(self, token_id: int) -> list[int]:
        """Go on with a token that was sampled; return the tokens that must follow and were not sampled.

        A token that the grammar does not admit, or a grammar that has outgrown its limits, sets `error`.
        """
        self._step(token_id)
        return self._take_forced()

    def admits(self, token_id: int) -> bool:
        """Whether this token may come next, if it is the model's own choice. Nothing changes.

        False for a special token that ends the sequence and stands in the grammar at once, though its mask holds it.
        """
        if self._forced:
            return token_id == self._forced[0]
        return self.llguidance.validate_tokens([token_id]) == 1

    @property
    def next_forced(self) -> int | None:
        """The only token that may be sampled next, if it is known."""
        return self._forced[0] if self._forced else None

    def note_mask(self, *, is_empty: bool) -> None:
        """A mask of this was filled; `is_empty`: it admits no token."""
        if self.llguidance.is_error():
            self._fail()
        elif is_empty:
            self.error = "the grammar admits no token here, and not the end either: it has a dead end"

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
        self.error = f"the grammar cannot go on: {shortened(self.llguidance.get_error())}"
