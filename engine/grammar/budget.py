"""What following a grammar may cost the steps: an account for each grammar, in CPU time. Knows nothing of grammars.

Following a token takes some microseconds, in an ambiguous grammar up to half a second, and more with each; so do masks,
and a long text that is forced. Every such call holds up all sequences. Where it lies is not in the grammar's size, nor
in any count that llguidance limits, so it is measured.
"""

import time
from dataclasses import dataclass, field

SECONDS_PER_TOKEN = 0.002  # that each token followed pays for: ten times what wide schemas take
MAX_DEBT_SECONDS = 0.25
_MAX_LAST_DEBT_SECONDS = 0.5
_RECOVERY = 0.01  # seconds that every second pays for
_SHORT_SECONDS = 0.001

Instant = tuple[float, float]  # by the clock, and of the calling thread's CPU time


def now() -> Instant:
    return time.perf_counter(), time.thread_time()


@dataclass(slots=True)
class GrammarBudget:
    """Of all sequences of one grammar. Losing a charge to a race costs nothing."""

    debt_seconds: float = 0.0  # that neither tokens nor time have paid for, at the last charge
    charged_at: float = field(default_factory=time.perf_counter)

    def charge_since(self, began: Instant, num_tokens: int) -> bool:
        """Charge the CPU time of the calling thread: what a machine does elsewhere is not the grammar's affair.

        A call that was short by any clock is not asked for its CPU time, which takes a microsecond to read.
        """
        ended_at = time.perf_counter()
        seconds = ended_at - began[0]
        if seconds > _SHORT_SECONDS:
            seconds = min(seconds, time.thread_time() - began[1])
        return self.charge(seconds, num_tokens, ended_at)

    def charge(self, seconds: float, num_tokens: int, at: float) -> bool:
        """Whether the sequence may go on: one whose call costs more than a token, in an overdrawn account, may not."""
        self.debt_seconds = max(0.0, self._debt(at) + seconds - SECONDS_PER_TOKEN * num_tokens)
        self.charged_at = at
        return seconds <= SECONDS_PER_TOKEN or not self.is_overdrawn

    @property
    def is_overdrawn(self) -> bool:
        """Nobody new may begin, and who makes it worse fails."""
        return self.debt_seconds > MAX_DEBT_SECONDS and self._debt(time.perf_counter()) > MAX_DEBT_SECONDS

    @property
    def is_exhausted(self) -> bool:
        """All fail that come to their next token, so that a step does not pay for each in turn."""
        return self.debt_seconds > _MAX_LAST_DEBT_SECONDS and self._debt(time.perf_counter()) > _MAX_LAST_DEBT_SECONDS

    def _debt(self, at: float) -> float:
        return max(0.0, self.debt_seconds - _RECOVERY * (at - self.charged_at))

    @property
    def reason(self) -> str:
        return (
            f"the grammar takes too long to follow, {self.debt_seconds:.1f} s more than its tokens may: "
            "say less in two ways (rules that derive nothing, or the same text differently)"
        )
