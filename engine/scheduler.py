"""Decides what each step computes: which sequences run, which wait, and which are preempted.

Owns the waiting queue and moves sequences between waiting and running. Knows nothing of tensors, models or text.

The rules
- A step computes at most `max_num_tokens` tokens. Every running decode is in every step; the rest of the budget goes to
  prefill chunks, most urgent first. So a prefill, however long, delays a decode by at most the rest of one step of
  `max_num_tokens` tokens.
- If `few_prefill_tokens` is given, a step has at most that many prompt tokens while few prompts wait, so that the first
  prompt need not wait for the last. With many prompts, fewer and larger steps are faster, because each step also
  computes the decodes.
- Urgency is (priority, deadline, arrival). Waiting sequences are admitted in that order. If the first one does not fit,
  those behind it wait, so that large sequences are not overtaken for ever. `WaitingQueue` explains why none starves.
- Admission allocates blocks for all present tokens of a sequence, so prefills never run out of blocks. Decodes may, and
  so may sequences with tokens forced by a grammar, which are computed like a prompt. Then the least urgent running
  sequence is preempted: it loses its blocks, keeps its tokens, waits at its old place and is computed again. The most
  urgent one is never preempted, so there is always progress.
- The other choices of a request start when the whole prompt of the first choice is planned, and share its blocks.
- If steps are forecast, a sequence for which this step has no tokens left is admitted if the next step has some.
- A waiting sequence preempts running ones only if they are less urgent by priority or, at the same priority, by
  deadline, and only if it then fits. Arrival order preempts nothing, so jobs without priorities and deadlines never
  preempt.
"""

from collections.abc import Container

import numpy as np

from engine.kv_cache.manager import KVCacheManager
from engine.runner.slots import SequenceSlots, SlotRows
from engine.sequence import Sequence
from engine.step_draft import StepDraft
from engine.step_forecast import NOTHING_FORESEEN, StepForecaster
from engine.step_plan import StepPlan
from engine.token_budget import TokenBudget
from engine.waiting_queue import WaitingQueue


class Scheduler:
    """Continuous batching under a budget of tokens, slots and blocks."""

    def __init__(
        self, slots: SequenceSlots, kv: KVCacheManager, budget: TokenBudget, *, looks_ahead: bool = False
    ) -> None:
        """`looks_ahead`: forecast the plan that follows each plan if no sequence ends, and keep to it for prompts."""
        self._forecaster = StepForecaster(slots, kv) if looks_ahead else None
        self._foreseen = NOTHING_FORESEEN
        self._slots = slots
        self._kv = kv
        self._budget = budget
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}  # by sequence_id
        self._prefilling: dict[int, Sequence] = {}  # by slot
        self._cached_tokens: dict[int, int] = {}  # by sequence_id, of sequences that started since the last step
        self._begun: list[int] = []  # sequences admitted since the last step
        self._ones = np.ones(slots.max_num_seqs, np.int64)
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._running or sequence_id in self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.push(sequence)

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence and free its slot and blocks; unknown ids are ignored."""
        if self._waiting.remove(sequence_id) is None and sequence_id in self._running:
            self.finish(self._slot_of(self._running[sequence_id]))

    def schedule(self) -> StepPlan | None:
        """Plan one step; None if there is nothing to do. Mutates: admits, preempts, and allocates the step's blocks."""
        self._budget.recover()
        self._admit_urgent()
        self._reserve_blocks()
        decodes = self._slots.decoding_slots()
        foreseen, self._foreseen = self._foreseen, NOTHING_FORESEEN
        draft = StepDraft(budget=self._prefill_tokens(max(len(decodes), foreseen.num_decodes)))
        for sequence in self._by_urgency(first=foreseen.prefilling):
            self._plan_chunk(draft, sequence)
        self._admit_waiting(draft)
        if not draft.slots and not len(decodes):
            assert not len(self._waiting), "sequences wait and none can run"
            return None
        plan = draft.mixed_plan(self._slots) if draft.slots else self._decode_plan()
        if self._forecaster is not None:
            budget = self._prefill_tokens(len(plan.sampled))
            if draft.budget <= 0:
                self._admit_ahead(plan, budget)
            self._foreseen = self._forecaster.foresee(plan, self._by_urgency(), budget=budget)
        return plan

    def _prefill_tokens(self, num_decodes: int) -> int:
        num_prompts = len(self._waiting) + len(self._prefilling)
        return self._budget.prefill_tokens(num_decodes=num_decodes, num_prompts=num_prompts)

    def _by_urgency(self, first: Container[int] = ()) -> list[Sequence]:
        """Sequences whose prompts are not computed completely, by urgency; those with ids in `first` come first."""
        if not self._prefilling:  # as in most steps
            return []
        return sorted(self._prefilling.values(), key=lambda s: (s.sequence_id not in first, s.urgency))

    def _admit_urgent(self) -> None:
        """Admit waiting sequences that are more urgent than a running one, preempting it if necessary."""
        while self._running and (head := self._waiting.head()) and head.is_before(self._slots.least_urgent()):
            if self._waits_for_sibling(head):
                return
            hits = self._make_room(head)
            if hits is None:
                return
            self._admit(head, hits)

    def _waits_for_sibling(self, head: Sequence) -> bool:
        """Whether another choice of the same request is still prefilling the prompt that both share."""
        return head.group_id is not None and any(
            sequence.group_id == head.group_id and not self._kv.is_prompt_shared(slot)
            for slot, sequence in self._prefilling.items()
        )

    def _make_room(self, head: Sequence) -> list[int] | None:
        """Preempt less urgent sequences until the head fits. Returns its cached blocks; None if it cannot fit."""
        less_urgent = [slot for slot, sequence in self._slots.sequences.items() if head.is_before(sequence)]
        hits = self._kv.match(head)
        releasable = int(self._slots.capacity[less_urgent].sum()) // self._slots.block_size
        reserve = _reserve(len(self._running) - len(less_urgent))
        if self._kv.num_wanted(head, hits) + reserve > self._kv.num_available + releasable:
            return None
        while not self._fits(head, hits):
            victim = self._slots.least_urgent()
            if not head.is_before(victim):  # shared blocks of the preempted sequences did not become free
                return None
            self.preempt(self._slot_of(victim))
            hits = self._kv.match(head)  # without prefix caching, some may have gone with the victim
        return hits

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit waiting sequences in order, as long as the step has tokens left and the next one fits."""
        while draft.budget > 0 and (slot := self._admit_next()) is not None:
            draft.newcomers.append(slot)
            self._plan_chunk(draft, self._slots.sequences[slot])

    def _admit_ahead(self, plan: StepPlan, budget: int) -> None:
        """Admit sequences for which only the next step has tokens left (`budget`), so that the forecast has them."""
        budget -= self._slots.num_uncomputed(list(self._prefilling)) - (plan.num_tokens - plan.num_decodes)
        while budget > 0 and (slot := self._admit_next()) is not None:
            plan.newcomers.append(slot)  # its first blocks may be ones that this step computes
            budget -= self._slots.num_uncomputed([slot])

    def _admit_next(self) -> int | None:
        """Admit the first waiting sequence; returns its slot, or None if there is none, it does not fit, or it must
        wait for another choice of its request."""
        head = self._waiting.head() if self._slots.num_free else None
        if head is None or self._waits_for_sibling(head):
            return None
        hits = self._kv.match(head)
        return self._admit(head, hits) if self._fits(head, hits) else None

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether a slot is free, and enough blocks beyond the reserve."""
        wanted = self._kv.num_wanted(sequence, hits) + _reserve(len(self._running))
        return self._slots.num_free > 0 and wanted <= self._kv.num_available

    def _admit(self, sequence: Sequence, hits: list[int]) -> int:
        self._waiting.admit(sequence)
        slot = self._slots.acquire(sequence)
        self._kv.admit(sequence, hits)
        self._running[sequence.sequence_id] = sequence
        self._begun.append(sequence.sequence_id)
        self._prefilling[slot] = sequence
        if sequence.num_cached_tokens is None:
            cached = min(int(self._slots.num_computed[slot]), sequence.num_prompt_tokens)
            sequence.num_cached_tokens = cached
            if cached:
                self._cached_tokens[sequence.sequence_id] = cached
        return slot

    def _reserve_blocks(self) -> None:
        """Allocate a block for every decode whose next token starts a block, and for prefills that have more tokens
        than when they were admitted, preempting others for it if necessary.
        """
        slots, kv = self._slots, self._kv
        while True:
            decoding = slots.decoding_slots()
            full = decoding[slots.num_computed[decoding] >= slots.capacity[decoding]]
            num_wanted = len(full)
            if self._prefilling:
                num_wanted += sum(map(kv.num_missing, self._prefilling))
            if num_wanted <= kv.num_available:
                break
            self.preempt(self._slot_of(self._slots.least_urgent()))
        if num_wanted:
            kv.grow(full)
            for slot in self._prefilling:
                kv.extend(slot)

    def preempt(self, slot: int) -> None:
        """Move the slot's sequence back to its old place in the waiting queue: it keeps its tokens, but no blocks."""
        self._kv.release(slot)
        self._waiting.push(self._leave(slot))
        self.num_preemptions += 1

    def finish(self, slot: int) -> None:
        """Remove the slot's finished sequence; the prefix cache may keep its blocks."""
        self._kv.release(slot)
        self._leave(slot)

    def fail(self, slot: int) -> None:
        """Remove the slot's failed sequence and discard its blocks, whose content may be wrong."""
        self._kv.discard(slot)
        self._leave(slot)

    def _leave(self, slot: int) -> Sequence:
        sequence = self._slots.release(slot)
        del self._running[sequence.sequence_id]
        self._prefilling.pop(slot, None)
        return sequence

    @staticmethod
    def _slot_of(sequence: Sequence) -> int:
        assert sequence.slot is not None, f"sequence {sequence.sequence_id} runs without a slot"
        return sequence.slot

    def _plan_chunk(self, draft: StepDraft, sequence: Sequence) -> None:
        slot = self._slot_of(sequence)
        start = int(self._slots.num_computed[slot])
        if num_new := draft.fit_chunk(self._slots, slot, start):
            draft.indexed_blocks += self._kv.index_blocks(slot, start + num_new)

    def _decode_plan(self) -> StepPlan:
        decodes = self._slots.decoding()
        num_rows = len(decodes)
        return StepPlan(
            slots=decodes.slots,
            starts=self._slots.num_computed[decodes.slots],
            num_new=self._ones[:num_rows],
            num_tokens=num_rows,
            sampled=decodes,
            sampled_index=None,
            num_decodes=num_rows,
        )

    def prefilled(self, rows: SlotRows, num_decodes: int) -> None:
        """The prompts in the rows after the decodes are computed, each with a sampled token: now all rows decode."""
        for slot in rows.slots[num_decodes:].tolist():
            del self._prefilling[slot]
        self._slots.start_decoding(rows)

    def extended(self, slots: list[int]) -> None:
        """These decoding slots got tokens beyond the sampled one, which must be computed first, as in a prefill."""
        for slot in slots:
            self._slots.stop_decoding(slot)
            self._prefilling[slot] = self._slots.sequences[slot]

    def take_begun(self) -> list[int]:
        """The sequences admitted since the last call."""
        begun, self._begun = self._begun, []
        return begun

    def take_cached_tokens(self) -> dict[int, int]:
        """Sequence id → prompt tokens found in the prefix cache, for those that began since the last call."""
        cached, self._cached_tokens = self._cached_tokens, {}
        return cached

    def reduce_budget(self, num_tokens: int) -> None:
        """A step of `num_tokens` tokens did not fit into device memory: plan half as many, then slowly more again."""
        self._budget.reduce(num_tokens, num_decodes=len(self._slots.decoding_slots()))
        self._foreseen = NOTHING_FORESEEN

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless slots, blocks and sequences agree. To be called between steps."""
        slots = self._slots
        slots.check_integrity()
        self._kv.check_integrity()
        assert {s.sequence_id for s in slots.sequences.values()} == set(self._running), "slots and sequences differ"
        assert not any(sequence_id in self._waiting for sequence_id in self._running), "a sequence waits and runs"
        decoding = slots.decoding_slots()
        assert set(decoding.tolist()) | set(self._prefilling) == set(slots.sequences), "a sequence does nothing"
        assert (slots.num_computed[decoding] == slots.num_tokens[decoding] - 1).all(), "a decode is out of step"


def _reserve(num_running: int) -> int:
    """Blocks to leave free when admitting: a quarter of the decodes need one within `block_size / 4` steps."""
    return num_running // 4
