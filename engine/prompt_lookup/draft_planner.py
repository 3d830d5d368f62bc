"""Lets decodes compute drafted tokens beside their last one, and keeps those that were going to be sampled anyway.

A drafted row computes its last token and the draft behind it, and samples at every one of these places, each with its
own noise. A drafted token counts if it is what its place samples; the first place that samples another gives the row's
new token, and what was computed behind it is void. So the tokens are those of a decode, one by one, wherever a row's
arithmetic does not depend on what is computed beside it.

Owns the blocks that drafts take for a step: free ones only, and never another sequence's. Knows nothing of models.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache.manager import KVCacheManager
from engine.messages import FinishCode, StepOutput
from engine.prompt_lookup.draft_budget import DraftBudget
from engine.prompt_lookup.drafter import MAX_DRAFT_TOKENS, Drafter
from engine.runner.slots import SequenceSlots
from engine.sampling_params import SamplingParams
from engine.step_plan import BAD_LOGITS, StepPlan, StepResult

_MAX_ROWS = 8  # with more sequences a step is bound by its products, and every further token costs its share
_MAX_TOKENS = 32  # of a step with drafts


def create_drafter(params: SamplingParams) -> Drafter | None:
    """None if what is sampled depends on more than logits and noise (counts, a grammar), or has logprobs to report."""
    is_plain = (
        params.grammar is None
        and params.logprobs is None
        and not params.min_tokens
        and not params.logit_bias
        and (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
    )
    return Drafter() if is_plain else None


class DraftPlanner:
    """Between the scheduler and the executor, and again between the executor and the recorder."""

    def __init__(self, slots: SequenceSlots, kv: KVCacheManager, *, max_num_tokens: int) -> None:
        self._slots = slots
        self._kv = kv
        self._max_num_tokens = min(max_num_tokens, _MAX_TOKENS)
        self._budget = DraftBudget()
        self.num_drafted = 0
        self.num_accepted = 0

    def draft(self, plan: StepPlan) -> StepPlan:
        """The plan with drafts in its rows; the same plan if there are none. Allocates blocks for them."""
        if not plan.is_decode or plan.num_rows > _MAX_ROWS:
            return plan
        self._budget.earn()
        max_length = min(self._max_num_tokens // plan.num_rows - 1, MAX_DRAFT_TOKENS)
        ends = (plan.starts + 1).tolist()
        row_lengths = [
            self._draft_row(slot, end, max_length) for slot, end in zip(plan.slots.tolist(), ends, strict=True)
        ]
        if not any(row_lengths):
            return plan
        lengths = np.array(row_lengths, np.int64)
        sampled_index = np.repeat(np.arange(plan.num_rows), lengths + 1)
        return StepPlan(
            slots=plan.slots,
            starts=plan.starts,
            num_new=plan.num_new + lengths,
            num_tokens=plan.num_tokens + int(lengths.sum()),
            sampled=self._slots.rows(plan.slots[sampled_index]),
            sampled_index=sampled_index,
            num_behind=np.concatenate([np.arange(length, -1, -1) for length in row_lengths]),
            num_decodes=plan.num_decodes,
            undrafted=plan,
        )

    def settle(self, plan: StepPlan, result: StepResult) -> tuple[StepPlan, StepResult, StepOutput | None]:
        """What a step with drafts comes to: a plan of as many tokens as count, one sampled token a row, and the drafted
        tokens that come before these. Gives back the blocks that the others took.
        """
        undrafted = plan.undrafted
        if undrafted is None:
            return plan, result, None
        sampled_index = plan.sampled_index
        assert sampled_index is not None
        firsts = plan.first_samples
        num_accepted = np.array(
            [self._accept(plan, result, row, first) for row, first in enumerate(firsts.tolist())], np.int64
        )
        settled = replace(undrafted, num_new=undrafted.num_new + num_accepted)
        result = replace(
            result,
            token_ids=result.token_ids[firsts + num_accepted],
            logprobs=result.logprobs and result.logprobs.with_rows(sampled_index[result.logprobs.rows]),
        )
        return settled, result, self._report(undrafted, num_accepted)

    def _draft_row(self, slot: int, num_tokens: int, max_length: int) -> int:
        """Write a draft behind the slot's tokens and return its length."""
        slots = self._slots
        sequence = slots.sequences[slot]
        if sequence.drafter is None or not (num_left := self._budget.num_left):
            return 0
        max_length = min(max_length, sequence.finish_rule.max_total_tokens - num_tokens - 1, num_left)
        draft = sequence.drafter.draft(slots.token_ids[slot, :num_tokens], max_length)
        num_drafted = num_tokens + len(draft)
        if not len(draft) or self._kv.num_missing(slot, num_drafted) > self._kv.num_available:
            return 0
        self._budget.spend(len(draft))
        self._kv.extend(slot, num_drafted)
        slots.token_ids[slot, num_tokens:num_drafted] = draft
        return len(draft)

    def _accept(self, plan: StepPlan, result: StepResult, row: int, first: int) -> int:
        """How many of a row's drafted tokens were sampled, up to a stop token, which is the row's last.

        None counts behind which there are no sound logits: it is the row's new token, and the next step sees to them.
        """
        slot, start, length = int(plan.slots[row]), int(plan.starts[row]), int(plan.num_new[row]) - 1
        if not length:
            return 0
        sequence = self._slots.sequences[slot]
        drafted = self._slots.token_ids[slot, start + 1 : start + 1 + length].tolist()
        sampled = result.token_ids[first : first + length + 1].tolist()
        stops = sequence.finish_rule.stop_token_ids
        num_accepted = 0
        while (
            num_accepted < length
            and sampled[num_accepted] == drafted[num_accepted] not in stops
            and sampled[num_accepted + 1] != BAD_LOGITS
        ):
            num_accepted += 1
        self._kv.shrink(slot, start + num_accepted + 2)
        assert sequence.drafter is not None
        has_paid = self._budget.pay(length, num_accepted, num_rows=plan.num_rows)
        sequence.drafter.note(length, num_accepted, has_paid=has_paid)
        self.num_drafted += length
        self.num_accepted += num_accepted
        return num_accepted

    def _report(self, plan: StepPlan, num_accepted: NDArray[np.int64]) -> StepOutput:
        rows = np.flatnonzero(num_accepted)
        table = self._slots.token_ids
        parts = [table[plan.slots[row], plan.starts[row] + 1 :][: num_accepted[row]] for row in rows]
        token_ids = np.concatenate([*parts, np.zeros(0, np.int32)])
        return StepOutput(
            sequence_ids=np.repeat(plan.sampled.sequence_ids, num_accepted),
            token_ids=token_ids,
            finish_codes=np.full(len(token_ids), FinishCode.NONE, np.int8),
        )
