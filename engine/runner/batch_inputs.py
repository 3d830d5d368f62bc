"""Turns a plan into the packed arrays of one forward, with numpy, from the arrays of the slots.

Owns the layout: tokens of all rows one after the other, in plan order. Knows nothing of torch or of devices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.grammar.masks import TokenMasks
from engine.runner.logit_edits import LogitEdits
from engine.runner.slots import SequenceSlots, SlotRows
from engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """Prompt tokens whose log-probabilities a step gives: of each, what precedes it is among the step's tokens."""

    slots: NDArray[np.int64]  # [num_scored]
    token_ids: NDArray[np.int64]  # [num_scored]
    logits_indices: NDArray[np.int64]  # [num_scored], the packed tokens before them
    num_top: int


@dataclass(slots=True, kw_only=True, eq=False)  # not frozen: that alone would cost a tenth of building a small step
class BatchInputs:
    """One step on the host: `num_tokens` tokens of `num_seqs` sequences, `num_sampled` of which yield a token."""

    input_ids: NDArray[np.int64]  # [num_tokens]
    position_ids: NDArray[np.int64]  # [num_tokens]
    slot_mapping: NDArray[np.int64]  # [num_tokens], block * block_size + offset
    query_start: NDArray[np.int32]  # [num_seqs + 1]
    context_lens: NDArray[np.int32]  # [num_seqs]
    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks of this step]
    logits_indices: NDArray[np.int64]  # [num_sampled], packed tokens
    sampled_positions: NDArray[np.int64]  # [num_sampled], index in prompt + output of the token to come
    sampling: SlotRows  # num_sampled rows; the same object for as long as the same slots decode
    max_query_len: int
    max_context_len: int
    num_decodes: int = 0  # leading sequences with one token each
    next_slots: NDArray[np.int64] | None = None  # of a step of decodes: each row's slot in the next one, -1 if none yet
    edits: LogitEdits | None = None  # None: no sampled row asks for any
    scored: ScoredTokens | None = None
    masks: TokenMasks | None = None  # of the sampled rows that have a grammar

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class BatchBuilder:
    """Builds `BatchInputs` from the slots' arrays."""

    def __init__(self, slots: SequenceSlots, *, looks_ahead: bool = False) -> None:
        """`looks_ahead`: say where the next tokens of decodes will go."""
        self._slots = slots
        self._looks_ahead = looks_ahead
        self._block_size = slots.block_size
        # query_start and logits_indices of any decode batch
        self._counting_32 = np.arange(slots.max_num_seqs + 1, dtype=np.int32)
        self._counting_64 = np.arange(slots.max_num_seqs, dtype=np.int64)

    def build(self, plan: StepPlan) -> BatchInputs:
        """Gather a plan's tokens, positions, pages and sampling rows."""
        return self._build_decode(plan) if plan.is_decode else self._build_mixed(plan)

    def _build_decode(self, plan: StepPlan) -> BatchInputs:
        rows, positions = plan.sampled, plan.starts
        num_rows = len(positions)
        context_lens = positions + 1
        max_context_len = int(context_lens[context_lens.argmax()])
        return BatchInputs(
            input_ids=self._slots.flat_token_ids[rows.token_offsets + positions].astype(np.int64),
            position_ids=positions,
            slot_mapping=self._pages(rows.block_offsets, positions),
            query_start=self._counting_32[: num_rows + 1],
            context_lens=context_lens.astype(np.int32),
            block_tables=self._block_tables(plan.slots, max_context_len + self._looks_ahead),
            next_slots=self._next_pages(rows, context_lens) if self._looks_ahead else None,
            logits_indices=self._counting_64[:num_rows],
            sampled_positions=context_lens,
            sampling=rows,
            max_query_len=1,
            max_context_len=max_context_len,
            num_decodes=num_rows,
            edits=self._edits(rows, context_lens),
        )

    def _build_mixed(self, plan: StepPlan) -> BatchInputs:
        assert plan.sampled_index is not None
        ends = plan.starts + plan.num_new
        query_start = np.zeros(plan.num_rows + 1, np.int32)
        np.cumsum(plan.num_new, out=query_start[1:])
        # Row i's packed tokens begin at query_start[i] and are positions starts[i], starts[i] + 1, ...
        shift = np.repeat(plan.starts - query_start[:-1], plan.num_new)
        positions = np.arange(plan.num_tokens) + shift  # [num_tokens]
        slot_of_token = np.repeat(plan.slots, plan.num_new)  # [num_tokens]
        sampled_positions = ends[plan.sampled_index]
        logits_indices = query_start[1:][plan.sampled_index].astype(np.int64) - 1
        if plan.num_behind is not None:
            sampled_positions = sampled_positions - plan.num_behind
            logits_indices -= plan.num_behind
        max_context_len = int(ends[ends.argmax()])
        slots = self._slots
        return BatchInputs(
            input_ids=slots.flat_token_ids[slot_of_token * slots.max_len + positions].astype(np.int64),
            position_ids=positions,
            slot_mapping=self._pages(slot_of_token * slots.max_blocks, positions),
            query_start=query_start,
            context_lens=ends.astype(np.int32),
            block_tables=self._block_tables(plan.slots, max_context_len),
            logits_indices=logits_indices,
            sampled_positions=sampled_positions,
            sampling=plan.sampled,
            max_query_len=int(plan.num_new.max()),
            max_context_len=max_context_len,
            num_decodes=int(np.append(plan.num_new != 1, True).argmax()),
            edits=self._edits(plan.sampled, sampled_positions),
            scored=self._scored(plan, query_start) if slots.is_scoring else None,
        )

    def _edits(self, rows: SlotRows, positions: NDArray[np.int64]) -> LogitEdits | None:
        return None if rows.edits is None else self._slots.edits.edits(rows.edits, positions)

    def _scored(self, plan: StepPlan, query_start: NDArray[np.int32]) -> ScoredTokens | None:
        """The plan's prompt positions whose next token is to be scored."""
        slots = self._slots
        first = np.maximum(plan.starts, slots.score_starts[plan.slots])
        num_scored = np.maximum(np.minimum(plan.starts + plan.num_new, slots.score_ends[plan.slots]) - first, 0)
        total = int(num_scored.sum())
        if not total:
            return None
        row = np.repeat(np.arange(plan.num_rows), num_scored)  # [num_scored]
        position = np.arange(total) + (first - (np.cumsum(num_scored) - num_scored))[row]
        slot = plan.slots[row]
        return ScoredTokens(
            slots=slot,
            token_ids=slots.flat_token_ids[slot * slots.max_len + position + 1].astype(np.int64),
            logits_indices=query_start[row] + position - plan.starts[row],
            num_top=max(slots.sequences[s].params.prompt_logprobs or 0 for s in plan.slots[num_scored > 0].tolist()),
        )

    def _pages(self, block_offsets: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the keys and values of each token lie in the cache."""
        index, offset = np.divmod(positions, self._block_size)
        blocks: NDArray[np.int64] = self._slots.flat_block_tables[block_offsets + index].astype(np.int64)
        return blocks * self._block_size + offset

    def _next_pages(self, rows: SlotRows, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `_pages`; -1 where the block is not there yet."""
        is_there = positions < self._slots.num_blocks[rows.slots] * self._block_size
        return np.where(is_there, self._pages(rows.block_offsets, positions - ~is_there), -1)

    def _block_tables(self, slots: NDArray[np.int64], max_context_len: int) -> NDArray[np.int32]:
        max_blocks = -(-max_context_len // self._block_size)
        return self._slots.block_tables[slots, :max_blocks]
