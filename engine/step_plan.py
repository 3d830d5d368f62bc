"""What one step computes: the scheduler's decision, on its way to the runner and back to the recorder."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.runner.slots import SlotRows
from engine.token_logprobs import TokenLogprobs


@dataclass(slots=True, kw_only=True, eq=False)
class StepPlan:
    """Row i computes `num_new[i]` tokens of slot `slots[i]`, beginning at position `starts[i]`. Decodes come first."""

    slots: NDArray[np.int64]  # [num_rows]
    starts: NDArray[np.int64]  # [num_rows]
    num_new: NDArray[np.int64]  # [num_rows]
    num_tokens: int
    sampled: SlotRows  # the rows that yield a token: those whose last known token is computed
    sampled_index: NDArray[np.int64] | None  # [num_sampled], rows of this plan; None: every row, one token each
    num_decodes: int  # leading rows
    num_behind: NDArray[np.int64] | None = None  # [num_sampled], the row's tokens behind the sampled place; None: 0
    undrafted: "StepPlan | None" = None  # the same without the drafts that were added to it
    following: "StepPlan | None" = None  # foreseen before the tokens are known that its decodes begin with
    newcomers: list[int] = field(default_factory=list)  # slots admitted by this plan
    indexed_blocks: list[int] = field(default_factory=list)  # in the prefix index already, computed by this step

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def is_decode(self) -> bool:
        """Every row computes one token and samples the next."""
        return self.sampled_index is None

    @property
    def sampled_positions(self) -> NDArray[np.int64]:
        """Of each sampled row the index of its new token, `[num_sampled]`, where no row has drafts."""
        ends = self.starts + self.num_new
        return ends if self.sampled_index is None else ends[self.sampled_index]

    @property
    def first_samples(self) -> NDArray[np.int64]:
        """Of the sampled places, each row's first: `[num_rows]`. Needs every row to be sampled."""
        assert self.sampled_index is not None
        return np.flatnonzero(np.diff(self.sampled_index, prepend=-1))


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """Of tokens whose sequences are there for their embeddings, in the order of their places."""

    slots: NDArray[np.int64]  # [num_rows]
    values: NDArray[np.float32]  # [num_rows, hidden_size]

    def of(self, slot: int) -> NDArray[np.float32]:
        """One slot's, `[num_rows, hidden_size]`."""
        values: NDArray[np.float32] = self.values[self.slots == slot]
        return values

    @staticmethod
    def concatenate(parts: "Iterable[HiddenStates | None]") -> "HiddenStates | None":
        """All of them, in order; None if there are none."""
        given = [part for part in parts if part is not None]
        if not given:
            return None
        slots, values = [part.slots for part in given], [part.values for part in given]
        return HiddenStates(np.concatenate(slots), np.concatenate(values))


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What a runner makes of one step."""

    token_ids: NDArray[np.int64]  # [num_sampled]; BAD_LOGITS where logits were not finite
    logprobs: TokenLogprobs | None = None  # rows are rows of the sampled logits
    prompt_logprobs: TokenLogprobs | None = None  # rows are slots
    hidden_states: HiddenStates | None = None


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What came of a plan."""

    token_ids: NDArray[np.int64]  # [num_sampled], as `plan.sampled`; BAD_LOGITS where logits were not finite
    logprobs: TokenLogprobs | None = None  # rows are rows of `plan.sampled`
    prompt_logprobs: TokenLogprobs | None = None  # rows are slots
    hidden_states: HiddenStates | None = None
    errors: dict[int, str] = field(default_factory=dict)  # slots that made the step raise, with the reason
    ran_out_of_memory: bool = False  # the step was run in parts


BAD_LOGITS = -1
MAX_SCORED_TOKENS = 256
"""Prompt tokens whose log-probabilities one step reports: each needs a row of logits, 0.6 MB of a large vocabulary."""
