"""How many tokens may be guessed in vain, so that guessing costs next to nothing where it does not help.

A sequence cannot see to that by itself: every new one has to try, and eight that try in turns slow down every step. So
all of an engine's share one account, in tokens: a drafted one costs one, an accepted one pays what it saved, and steps
earn a little. What is spent in vain is thus bounded by the number of steps, whoever runs. Knows nothing of sequences.
"""

from engine.prompt_lookup.drafter import FIRST_LENGTH, MAX_DRAFT_TOKENS

# A token more costs a lone decode of SmolLM2-135M 7 to 10% of its time (float32 and int8, two cores), and each of eight
# 4%: a step costs as much as so many tokens beyond those of its rows.
_STEP_TOKENS = 8
_STEPS_PER_TOKEN = 8  # that earn one token to be guessed in vain: at most 1.3% of a lone decode's time
_MAX_TOKENS = 2 * MAX_DRAFT_TOKENS


class DraftBudget:
    """Spent when a draft is made, paid back when it is known what came of it."""

    def __init__(self) -> None:
        self._credit = float(_MAX_TOKENS)

    @property
    def num_left(self) -> int:
        """Tokens that may be drafted now; none before there are enough for a first draft."""
        return int(self._credit) if self._credit >= FIRST_LENGTH else 0

    def earn(self) -> None:
        """A step that could have had drafts."""
        self._add(1 / _STEPS_PER_TOKEN)

    def spend(self, num_drafted: int) -> None:
        """Needs so many to be left."""
        assert num_drafted <= self.num_left
        self._credit -= num_drafted

    def pay(self, num_drafted: int, num_accepted: int, *, num_rows: int) -> bool:
        """Pay in what a draft saved in a step of `num_rows` sequences; whether that was as much as it had cost."""
        saved = num_accepted * (_STEP_TOKENS + num_rows) / num_rows
        self._add(saved)
        return saved >= num_drafted

    def _add(self, num_tokens: float) -> None:
        self._credit = min(self._credit + num_tokens, float(_MAX_TOKENS))
