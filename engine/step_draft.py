"""The prefill rows of a plan in the making, and the plan they become beside the decodes.

Owns what is left of a step's budgets of tokens and of scored prompt tokens. Knows nothing of who is to run: the
scheduler puts one chunk after the other into it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.runner.slots import SequenceSlots, SlotRows
from engine.step_plan import MAX_SCORED_TOKENS, StepPlan


@dataclass(slots=True)
class StepDraft:
    """Chunks in the order in which they were added: a later one may read blocks that an earlier one computes."""

    budget: int  # tokens left
    num_scores_left: int = MAX_SCORED_TOKENS
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_new: list[int] = field(default_factory=list)
    completing: list[int] = field(default_factory=list)  # rows that reach their last token, and sample the next
    newcomers: list[int] = field(default_factory=list)  # slots
    indexed_blocks: list[int] = field(default_factory=list)

    def fit_chunk(self, table: SequenceSlots, slot: int, start: int) -> int:
        """So many of the slot's tokens from there on as the step may yet compute, and score; taken off the budgets."""
        num_left = int(table.num_tokens[slot]) - start
        num_new = min(self.budget, num_left)
        if table.is_scoring:
            num_new = self._limit_scores(table, slot, start, num_new)
        if num_new:
            if num_new == num_left and slot not in table.pooling:
                self.completing.append(len(self.slots))
            self.slots.append(slot)
            self.starts.append(start)
            self.num_new.append(num_new)
            self.budget -= num_new
        return num_new

    def _limit_scores(self, table: SequenceSlots, slot: int, start: int, num_new: int) -> int:
        first = max(start, int(table.score_starts[slot]))
        num_scored = max(0, min(start + num_new, int(table.score_ends[slot])) - first)
        if num_scored > self.num_scores_left:
            num_scored = self.num_scores_left
            num_new = first + num_scored - start
        self.num_scores_left -= num_scored
        return num_new

    def mixed_plan(self, table: SequenceSlots) -> StepPlan:
        """The decodes' rows, then the chunks'."""
        decodes = table.decoding_slots()
        return self._plan(table, decodes, table.num_computed[decodes], table.decoding)

    def plan_after(self, table: SequenceSlots, rows: SlotRows, starts: NDArray[np.int64]) -> StepPlan:
        """The same where these rows decode, at these positions."""
        return self._plan(table, rows.slots, starts, lambda: rows)

    def _plan(
        self,
        table: SequenceSlots,
        decodes: NDArray[np.int64],
        decode_starts: NDArray[np.int64],
        gather: Callable[[], SlotRows],
    ) -> StepPlan:
        """`gather`: the decodes' rows, asked for if no others are sampled."""
        num_decodes, num_completing = len(decodes), len(self.completing)
        rows = np.empty((3, num_decodes + len(self.slots)), np.int64)
        slots, starts, num_new = rows
        slots[:num_decodes] = decodes
        starts[:num_decodes] = decode_starts
        num_new[:num_decodes] = 1
        rows[:, num_decodes:] = self.slots, self.starts, self.num_new
        sampled_index = np.arange(num_decodes + num_completing)
        sampled_index[num_decodes:] = [num_decodes + row for row in self.completing]
        return StepPlan(
            slots=slots,
            starts=starts,
            num_new=num_new,
            num_tokens=num_decodes + sum(self.num_new),
            sampled=table.rows(slots[sampled_index]) if num_completing else gather(),
            sampled_index=sampled_index,
            num_decodes=num_decodes,
            newcomers=self.newcomers,
            indexed_blocks=self.indexed_blocks,
        )
