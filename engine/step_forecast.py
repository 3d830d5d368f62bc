"""What the next step computes if every sequence goes on and nobody comes: planned before this step's tokens are known.

A device is given that step before the host has read this one. The next plan gives the same prompts as many tokens,
since a chunk of another length would have to be computed anew. Knows nothing of devices, or of whether anybody computes
what it foresees.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache.manager import KVCacheManager
from engine.runner.slots import SequenceSlots
from engine.sequence import Sequence
from engine.step_draft import StepDraft
from engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Who has the next step's tokens before all others."""

    prefilling: frozenset[int] = frozenset()  # sequence ids, of those whose prompts go on
    num_decodes: int = 0  # beside which their chunks fit the budget


NOTHING_FORESEEN = Foreseen()


class StepForecaster:
    """Plans from what the slots hold while a step is under way."""

    def __init__(self, slots: SequenceSlots, kv: KVCacheManager) -> None:
        self._slots = slots
        self._kv = kv

    def foresee(self, plan: StepPlan, prefilling: Iterable[Sequence], *, budget: int) -> Foreseen:
        """Set the plan's `following`, and give its decodes the blocks that they begin where so many are free.

        prefilling: whose prompts are not computed yet, most urgent first; budget: of the next step, in prompt tokens.
        """
        rows, positions = plan.sampled, plan.sampled_positions
        draft = StepDraft(budget=budget)
        chunks = slice(plan.num_decodes, None)
        ends = dict(zip(plan.slots[chunks].tolist(), (plan.starts + plan.num_new)[chunks].tolist(), strict=True))
        for sequence in prefilling:
            slot = sequence.slot
            assert slot is not None
            start = ends.get(slot, self._slots.num_computed.item(slot))
            if start < self._slots.num_tokens[slot]:
                if self._slots.is_scoring:  # how much of it fits depends on what this step will have scored
                    return NOTHING_FORESEEN
                if slot in self._slots.pooling:  # what it gives beside logits is not kept for the step it is guessed of
                    return NOTHING_FORESEEN
                draft.fit_chunk(self._slots, slot, start)
        if not (len(rows) or draft.slots):
            return NOTHING_FORESEEN
        self._reserve(rows.slots, positions)
        plan.following = draft.plan_after(self._slots, rows, positions)
        if not draft.slots:
            return NOTHING_FORESEEN
        return Foreseen(frozenset(self._slots.sequence_id[draft.slots].tolist()), len(rows))

    def _reserve(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        capacity = self._slots.capacity[slots]
        growing = slots[positions >= capacity]
        if 0 < len(growing) <= self._kv.num_available:
            self._kv.grow(growing)
