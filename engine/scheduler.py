"""Decides what each step computes: who runs, who waits, who has to make room.

Owns the waiting queue and the sequences' way between waiting and running. Knows nothing of tensors, models or text.

The rules
- A step computes at most `max_num_tokens` tokens. Every running decode is in every step; what is left of the budget
  goes to prefill chunks, most urgent first. So a prefill, however long, holds up a decode by no more than the rest of
  one step of `max_num_tokens` tokens.
- Where `few_prefill_tokens` is given, a step has no more prompt tokens than that while few prompts wait: the first of
  them need not wait for the last. Of many the tokens come sooner from fewer steps, each with the decodes in it.
- Urgency is (priority, deadline, arrival). Waiting sequences are admitted in that order, and a head that does not fit
  holds up the line, so that large ones are not passed over for ever. `WaitingQueue` says why nobody starves.
- Admission takes blocks for all of a sequence's present tokens, so prefills never run short. Decodes may, and so may
  sequences on which a grammar forces tokens, which are computed like a prompt's. Then the least urgent running sequence
  is preempted: its blocks go, its tokens stay, it waits at its old place and is computed again. The most urgent one is
  never preempted, so there is always progress.
- The choices of one request begin once the first of them has its whole prompt planned, and start from its blocks.
- Where the next step is foreseen, who finds no tokens left in this one is admitted for those that the next has left.
- A waiting sequence preempts running ones only of a lower priority, or of the same and a later deadline or none, and
  only if that makes it fit. Arrival alone preempts nobody, so jobs without priorities and deadlines never do.
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
        """`looks_ahead`: say of each plan which one follows if all goes on, and keep to it where prompts go on."""
        self._forecaster = StepForecaster(slots, kv) if looks_ahead else None
        self._foreseen = NOTHING_FORESEEN
        self._slots = slots
        self._kv = kv
        self._budget = budget
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}  # by sequence_id
        self._prefilling: dict[int, Sequence] = {}  # by slot
        self._cached_tokens: dict[int, int] = {}  # of sequences that began since the last step
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
        """Forget a sequence and free what it holds; unknown ids are passed over."""
        if self._waiting.remove(sequence_id) is None and sequence_id in self._running:
            self.finish(self._slot_of(self._running[sequence_id]))

    def schedule(self) -> StepPlan | None:
        """Plan one step; None if there is nothing to do. Mutates: admits, preempts, and allocates the step's blocks."""
        self._budget.recover()
        self._admit_urgent()
        ran_short = self._reserve_blocks()
        decodes = self._slots.decoding_slots()
        foreseen, self._foreseen = self._foreseen, NOTHING_FORESEEN
        draft = StepDraft(budget=self._prefill_tokens(max(len(decodes), foreseen.num_decodes)))
        for sequence in self._by_urgency(first=foreseen.prefilling):
            self._plan_chunk(draft, sequence)
        if not ran_short:
            self._admit_waiting(draft)
        if not draft.slots and not len(decodes):
            assert not len(self._waiting), "sequences wait and none can run"
            return None
        plan = draft.mixed_plan(self._slots) if draft.slots else self._decode_plan()
        if self._forecaster is not None:
            budget = self._prefill_tokens(len(plan.sampled))
            if not ran_short and draft.budget <= 0:
                self._admit_ahead(plan, budget)
            self._foreseen = self._forecaster.foresee(plan, self._by_urgency(), budget=budget)
        return plan

    def _prefill_tokens(self, num_decodes: int) -> int:
        num_prompts = len(self._waiting) + len(self._prefilling)
        return self._budget.prefill_tokens(num_decodes=num_decodes, num_prompts=num_prompts)

    def _by_urgency(self, first: Container[int] = ()) -> list[Sequence]:
        """Whose prompts are not computed yet; those with an id in `first` before all others."""
        if not self._prefilling:  # as in most steps
            return []
        return sorted(self._prefilling.values(), key=lambda s: (s.sequence_id not in first, s.urgency))

    def _admit_urgent(self) -> None:
        """Admit waiting sequences that come before somebody who runs, at that somebody's cost if need be."""
        while self._running and (head := self._waiting.head()) and head.is_before(self._slots.least_urgent()):
            if self._waits_for_sibling(head):
                return
            hits = self._make_room(head)
            if hits is None:
                return
            self._admit(head, hits)

    def _waits_for_sibling(self, head: Sequence) -> bool:
        """Whether another choice of the request is about to plan the prompt that the head would compute again."""
        return head.group_id is not None and any(
            sequence.group_id == head.group_id and not self._kv.is_prompt_shared(slot)
            for slot, sequence in self._prefilling.items()
        )

    def _make_room(self, head: Sequence) -> list[int] | None:
        """Preempt less urgent sequences until the head fits; return its hits, or None if it would not fit even then."""
        less_urgent = [slot for slot, sequence in self._slots.sequences.items() if head.is_before(sequence)]
        hits = self._kv.match(head)
        releasable = int(self._slots.capacity[less_urgent].sum()) // self._slots.block_size
        reserve = _reserve(len(self._running) - len(less_urgent))
        if self._kv.num_wanted(head, hits) + reserve > self._kv.num_available + releasable:
            return None
        while not self._fits(head, hits):
            victim = self._slots.least_urgent()
            if not head.is_before(victim):  # blocks that others share too did not come free
                return None
            self.preempt(self._slot_of(victim))
            hits = self._kv.match(head)  # with prefix caching off some may be gone with the victim
        return hits

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit from the head of the line for as long as the step has tokens and the head fits."""
        while draft.budget > 0 and (slot := self._admit_next()) is not None:
            draft.newcomers.append(slot)
            self._plan_chunk(draft, self._slots.sequences[slot])

    def _admit_ahead(self, plan: StepPlan, budget: int) -> None:
        """Admit who finds no tokens left in this step, but some of the next one's `budget`, so that it is foreseen."""
        budget -= self._slots.num_uncomputed(list(self._prefilling)) - (plan.num_tokens - plan.num_decodes)
        while budget > 0 and (slot := self._admit_next()) is not None:
            plan.newcomers.append(slot)  # the blocks that it begins with may be those that this step computes
            budget -= self._slots.num_uncomputed([slot])

    def _admit_next(self) -> int | None:
        """The slot of the head of the line; None if there is none, it does not fit, or is to wait for its sibling."""
        head = self._waiting.head() if self._slots.num_free else None
        if head is None or self._waits_for_sibling(head):
            return None
        hits = self._kv.match(head)
        return self._admit(head, hits) if self._fits(head, hits) else None

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether there is a slot, and blocks beyond the reserve."""
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

    def _reserve_blocks(self) -> bool:
        """Give a block to every decode whose next token begins one, and to prefills that were given more tokens than
        they were admitted with what these need. True if somebody was preempted for it.
        """
        slots, kv = self._slots, self._kv
        ran_short = False
        while True:
            decoding = slots.decoding_slots()
            full = decoding[slots.num_computed[decoding] >= slots.capacity[decoding]]
            num_wanted = len(full)
            if self._prefilling:
                num_wanted += sum(map(kv.num_missing, self._prefilling))
            if num_wanted <= kv.num_available:
                break
            self.preempt(self._slot_of(self._slots.least_urgent()))
            ran_short = True
        if num_wanted:
            kv.grow(full)
            for slot in self._prefilling:
                kv.extend(slot)
        return ran_short

    def preempt(self, slot: int) -> None:
        """Back to the waiting, at its old place, with all its tokens and none of its blocks."""
        self._kv.release(slot)
        self._waiting.push(self._leave(slot))
        self.num_preemptions += 1

    def finish(self, slot: int) -> None:
        """The slot's sequence is over; what it computed may serve others."""
        self._kv.release(slot)
        self._leave(slot)

    def fail(self, slot: int) -> None:
        """The slot's sequence is over and what it computed is suspect."""
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
        """The prompts of the rows behind the decodes are computed, and a token of each sampled: all rows decode."""
        for slot in rows.slots[num_decodes:].tolist():
            del self._prefilling[slot]
        self._slots.start_decoding(rows)

    def extended(self, slots: list[int]) -> None:
        """These slots decoded and were given tokens beyond the sampled one: they are to be computed first."""
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
        """A step of `num_tokens` tokens did not fit the device: plan half as many, and feel the way up again."""
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
    """Blocks to leave when admitting: a quarter of the decodes want one in the next quarter of a block's steps."""
    return num_running // 4
