"""Runs a plan, in parts where the whole fails, so that one sequence's failure stays its own.

A step that raises is halved until it runs or a single row is at fault; a row too large for the device's memory is
halved too. Steps only write keys and values, so parts may run again. Knows nothing of what a failure means for the
sequences: the recorder does.
"""

from dataclasses import dataclass, replace

import numpy as np

from engine.errors import DeviceLostError, DeviceMemoryError
from engine.field_types import shortened
from engine.grammar.masks import MaskFiller, TokenMasks
from engine.runner.base import Runner
from engine.runner.batch_inputs import BatchBuilder
from engine.runner.slots import SequenceSlots
from engine.step_plan import BAD_LOGITS, HiddenStates, StepPlan, StepResult
from engine.token_logprobs import concatenate


class StepExecutor:
    """A runner behind a builder, with isolation."""

    def __init__(self, runner: Runner, slots: SequenceSlots) -> None:
        self._runner = runner
        self._slots = slots
        self._builder = BatchBuilder(slots)
        self._masks = MaskFiller(runner.info.vocab_size)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan. Raises `DeviceLostError`, also if not one row of several ran: that is no request's fault."""
        result = self._run(plan)
        if result.errors and len(result.errors) == plan.num_rows > 1:
            reason = next(iter(result.errors.values()))
            raise DeviceLostError(f"all {plan.num_rows} sequences of a step failed: {reason}")
        return result

    def _run(self, plan: StepPlan) -> StepResult:
        try:
            inputs = self._builder.build(plan)
            inputs.masks = self._start_masks(plan)
            sampled = self._runner.execute(inputs)
            return StepResult(
                token_ids=sampled.token_ids,
                logprobs=sampled.logprobs,
                prompt_logprobs=sampled.prompt_logprobs,
                hidden_states=sampled.hidden_states,
            )
        except DeviceLostError:
            raise
        except Exception as error:
            failure = _Failure(
                shortened(f"{type(error).__name__}: {error}"), is_memory=isinstance(error, DeviceMemoryError)
            )
        # Only here, where the exception and the tensors that its frames held are gone, is there memory for the parts.
        return self._run_parts(plan, failure)

    def _start_masks(self, plan: StepPlan) -> TokenMasks | None:
        """What the grammars say of the step; masks that are needed in any case are filled while the device computes."""
        rows = plan.sampled
        constrained = rows.constrained
        if not len(constrained):
            return None
        sequences = self._slots.sequences
        grammars = [sequences[slot].grammar for slot in rows.slots[constrained].tolist()]
        matchers = [matcher for matcher in grammars if matcher is not None]
        return TokenMasks(self._masks, constrained, matchers, rows.has_filter[constrained])

    def _run_parts(self, plan: StepPlan, failure: "_Failure") -> StepResult:
        if plan.undrafted is not None:
            return _without_drafts(plan, self._run(plan.undrafted))
        if plan.num_rows > 1:
            parts = self._halve_rows(plan)
        elif failure.is_memory and plan.num_tokens > 1:
            parts = self._halve_chunk(plan)
        else:
            nothing = np.full(len(plan.sampled), BAD_LOGITS, np.int64)
            return StepResult(
                token_ids=nothing, errors={int(plan.slots[0]): failure.reason}, ran_out_of_memory=failure.is_memory
            )
        results = [self._run(part) for part in parts]
        num_before = np.cumsum([0, *(len(result.token_ids) for result in results)])
        return StepResult(
            token_ids=np.concatenate([result.token_ids for result in results]),
            logprobs=concatenate(
                result.logprobs and result.logprobs.moved(before)
                for result, before in zip(results, num_before, strict=False)
            ),
            prompt_logprobs=concatenate(result.prompt_logprobs for result in results),
            hidden_states=HiddenStates.concatenate(result.hidden_states for result in results),
            errors={slot: reason for result in results for slot, reason in result.errors.items()},
            ran_out_of_memory=failure.is_memory or any(result.ran_out_of_memory for result in results),
        )

    def _halve_rows(self, plan: StepPlan) -> tuple[StepPlan, StepPlan]:
        """Cut between two rows. The halves keep the order: later rows may read blocks that earlier ones compute."""
        middle = plan.num_rows // 2
        return self._rows(plan, 0, middle), self._rows(plan, middle, plan.num_rows)

    def _rows(self, plan: StepPlan, begin: int, end: int) -> StepPlan:
        sampled = np.arange(plan.num_rows) if plan.sampled_index is None else plan.sampled_index
        inside = sampled[(sampled >= begin) & (sampled < end)]
        return StepPlan(
            slots=plan.slots[begin:end],
            starts=plan.starts[begin:end],
            num_new=plan.num_new[begin:end],
            num_tokens=int(plan.num_new[begin:end].sum()),
            sampled=self._slots.rows(plan.slots[inside]),
            sampled_index=None if plan.is_decode else inside - begin,
            num_decodes=min(max(plan.num_decodes - begin, 0), end - begin),
        )

    def _halve_chunk(self, plan: StepPlan) -> tuple[StepPlan, StepPlan]:
        """Cut the only row's chunk in two; the second half samples if the whole did."""
        assert plan.sampled_index is not None, "a decode of one token cannot be halved"
        num_first = plan.num_tokens // 2
        nobody = np.zeros(0, np.int64)
        return (
            StepPlan(
                slots=plan.slots,
                starts=plan.starts,
                num_new=np.array([num_first]),
                num_tokens=num_first,
                sampled=self._slots.rows(nobody),
                sampled_index=nobody,
                num_decodes=0,
            ),
            StepPlan(
                slots=plan.slots,
                starts=plan.starts + num_first,
                num_new=plan.num_new - num_first,
                num_tokens=plan.num_tokens - num_first,
                sampled=plan.sampled,
                sampled_index=plan.sampled_index,
                num_decodes=0,
            ),
        )


def _without_drafts(plan: StepPlan, result: StepResult) -> StepResult:
    """The result of `plan.undrafted` as one of the plan: nothing was sampled behind drafted tokens."""
    firsts = plan.first_samples
    token_ids = np.full(len(plan.sampled), BAD_LOGITS, np.int64)
    token_ids[firsts] = result.token_ids
    logprobs = result.logprobs and result.logprobs.with_rows(firsts[result.logprobs.rows])
    return replace(result, token_ids=token_ids, logprobs=logprobs)


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    is_memory: bool
