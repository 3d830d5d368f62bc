"""Writes a step's tokens into the slots, ends the sequences that are done, and says so in a `StepOutput`.

Owns the stop conditions: a stop token (it counts and is reported), `max_tokens`, a full context, an error, an embedding
that is there. Knows nothing of text: stop strings are the parent's affair. In a step of decodes only a finished
sequence costs Python work.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.grammar.forced_tokens import append_forced_tokens
from engine.kv_cache.manager import KVCacheManager
from engine.messages import FinishCode, StepOutput
from engine.runner.slots import SequenceSlots, SlotRows
from engine.scheduler import Scheduler
from engine.step_plan import BAD_LOGITS, HiddenStates, StepPlan, StepResult
from engine.token_logprobs import TokenLogprobs

BAD_LOGITS_REASON = "the model's logits were not finite for this sequence (NaN or infinity)"
BAD_HIDDEN_REASON = "the model's hidden states were not finite for this sequence (NaN or infinity)"


class StepRecorder:
    """The bookkeeping after a forward."""

    def __init__(self, slots: SequenceSlots, kv: KVCacheManager, scheduler: Scheduler) -> None:
        self._slots = slots
        self._kv = kv
        self._scheduler = scheduler
        self.num_prompt_tokens = 0  # prefilled, recomputation included
        self.num_cached_tokens = 0

    def record(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Take in what a plan gave. Mutates slots, blocks and the scheduler's sequences."""
        errors: dict[int, str] = {}
        if result.errors or np.count_nonzero(result.token_ids < 0) or _bad_slots(result.hidden_states):
            plan, result, errors = self._drop_failed(plan, result)
        token_ids = result.token_ids.astype(np.int32)  # as the tables hold them
        if result.ran_out_of_memory:
            self._scheduler.reduce_budget(plan.num_tokens)
        rows = plan.sampled
        totals = plan.starts + plan.num_new  # tokens computed of each row; where it samples: the new token's index
        self._slots.num_computed[plan.slots] = totals
        if plan.sampled_index is not None:
            if len(rows) > plan.num_decodes:
                self._scheduler.prefilled(rows, plan.num_decodes)
            totals = totals[plan.sampled_index]
        self._slots.flat_token_ids[rows.token_offsets + totals] = token_ids
        num_tokens = totals + 1
        self._slots.num_tokens[rows.slots] = num_tokens
        output = StepOutput(
            sequence_ids=rows.sequence_ids,
            token_ids=token_ids,
            finish_codes=_finish_codes(rows, token_ids, num_tokens),
            errors=errors,
            cached_tokens=self._scheduler.take_cached_tokens(),
            logprobs=result.logprobs,
            prompt_logprobs=result.prompt_logprobs and self._take_scores(result.prompt_logprobs),
        )
        if result.hidden_states is not None:
            self._pool(result.hidden_states, output.embeddings)
        self.num_prompt_tokens += plan.num_tokens - plan.num_decodes
        self.num_cached_tokens += sum(output.cached_tokens.values())
        ended = rows.slots[output.finish_codes.nonzero()[0]].tolist()
        if len(rows.constrained):
            output = self._advance_grammars(rows, output, ended)
        for slot in ended:
            self._scheduler.finish(slot)
        return output

    def _advance_grammars(self, rows: SlotRows, output: StepOutput, ended: list[int]) -> StepOutput:
        """Append what grammars force after the sampled tokens; add the slots that these end to `ended`."""
        forced = append_forced_tokens(self._slots, rows, output)
        self._scheduler.extended(forced.extended)
        ended += [slot for slot in forced.ended if slot not in ended]
        return forced.output

    def _take_scores(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        """Count the prompt tokens that were scored; the same with sequence ids for slots."""
        slots, counts = np.unique(logprobs.rows, return_counts=True)
        self._slots.score_starts[slots] += counts
        return logprobs.with_rows(self._slots.sequence_id[logprobs.rows])

    def _pool(self, hidden_states: HiddenStates, embeddings: dict[int, NDArray[np.float32]]) -> None:
        """Give each pooler its tokens; a sequence whose prompt is computed is over, and its embedding there."""
        for slot in np.unique(hidden_states.slots).tolist():
            sequence = self._slots.sequences[slot]
            assert sequence.pooler is not None
            sequence.pooler.add(hidden_states.of(slot))
            if self._slots.num_computed[slot] == self._slots.num_tokens[slot]:
                embeddings[sequence.sequence_id] = sequence.pooler.vector()
                self._scheduler.finish(slot)

    def _drop_failed(self, plan: StepPlan, result: StepResult) -> tuple[StepPlan, StepResult, dict[int, str]]:
        """End the failed sequences and return the rest of the plan, of its result, and the reasons by sequence id.

        The step's newcomers may lean on blocks that a failed sequence was to compute: they wait again, and what they
        gave is dropped. For the same reason no block that the step was to compute stays in the index.
        """
        failed = self._failed(plan, result)
        self._kv.forget(plan.indexed_blocks)
        errors: dict[int, str] = {}
        for slot, reason in failed.items():
            errors[self._slots.sequences[slot].sequence_id] = reason
            self._scheduler.fail(slot)
        for slot in plan.newcomers:
            if slot not in failed:
                self._scheduler.preempt(slot)
        gone = np.array([*failed, *plan.newcomers], np.int64)
        keep = ~np.isin(plan.slots, gone)
        keep_sampled = ~np.isin(plan.sampled.slots, gone)
        sampled_index = plan.sampled_index
        if sampled_index is not None:
            sampled_index = (np.cumsum(keep) - 1)[sampled_index[keep_sampled]]
        rest = replace(
            plan,
            slots=plan.slots[keep],
            starts=plan.starts[keep],
            num_new=plan.num_new[keep],
            num_tokens=int(plan.num_new[keep].sum()),
            sampled=self._slots.rows(plan.sampled.slots[keep_sampled]),
            sampled_index=sampled_index,
            num_decodes=int(keep[: plan.num_decodes].sum()),
        )
        return rest, _rest_of(result, keep_sampled, gone), errors

    @staticmethod
    def _failed(plan: StepPlan, result: StepResult) -> dict[int, str]:
        """Slot → reason. A newcomer's bad logits count only if nothing failed before it: they may be borrowed."""
        failed = dict(result.errors)
        for slot in plan.sampled.slots[result.token_ids == BAD_LOGITS].tolist():
            if not failed or slot not in plan.newcomers:
                failed.setdefault(slot, BAD_LOGITS_REASON)
        for slot in _bad_slots(result.hidden_states):
            if not failed or slot not in plan.newcomers:
                failed.setdefault(slot, BAD_HIDDEN_REASON)
        return failed


def _bad_slots(hidden_states: HiddenStates | None) -> list[int]:
    """Slots with a hidden state that is not finite."""
    if hidden_states is None:
        return []
    is_bad = ~np.isfinite(hidden_states.values).all(axis=1)
    return list(dict.fromkeys(hidden_states.slots[is_bad].tolist()))


def _rest_of(result: StepResult, keep_sampled: NDArray[np.bool_], gone: NDArray[np.int64]) -> StepResult:
    """What a result says of the sampled rows to keep, and of the slots that are not gone."""
    logprobs, prompt_logprobs = result.logprobs, result.prompt_logprobs
    if logprobs is not None:
        logprobs = logprobs.of_rows(keep_sampled)
    if prompt_logprobs is not None:
        prompt_logprobs = prompt_logprobs.select(~np.isin(prompt_logprobs.rows, gone))
    hidden_states = result.hidden_states
    if hidden_states is not None:
        keep = ~np.isin(hidden_states.slots, gone)
        hidden_states = HiddenStates(hidden_states.slots[keep], hidden_states.values[keep])
    return replace(
        result,
        token_ids=result.token_ids[keep_sampled],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        hidden_states=hidden_states,
    )


def _finish_codes(rows: SlotRows, token_ids: NDArray[np.int32], num_tokens: NDArray[np.int64]) -> NDArray[np.int8]:
    """`FinishCode` of each row whose new token makes it `num_tokens` long."""
    codes = np.zeros(len(rows), np.int8)
    codes[num_tokens >= rows.max_totals] = FinishCode.LENGTH
    for stop_ids in rows.stop_ids:  # a few at most; all at once would take numpy longer than each by itself
        codes[stop_ids == token_ids] = FinishCode.STOP
    for row, stop_set in rows.long_stops:
        if int(token_ids[row]) in stop_set:
            codes[row] = FinishCode.STOP
    return codes
