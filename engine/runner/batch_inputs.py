"""Turns a plan into the packed arrays of one forward, with numpy, from the arrays of the slots.

Owns the layout: tokens of all rows one after the other, in plan order. Knows nothing of torch or of devices.
"""

from dataclasses import dataclass
from itertools import accumulate

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


@dataclass(frozen=True, slots=True, eq=False)
class PooledTokens:
    """Tokens whose hidden states a step gives."""

    slots: NDArray[np.int64]  # [num_pooled]
    indices: NDArray[np.int64]  # [num_pooled], packed tokens


@dataclass(slots=True, kw_only=True, eq=False)  # not frozen: that alone would cost a tenth of building a small step
class BatchInputs:
    """One step on the host: `num_tokens` tokens of `num_seqs` sequences, `num_sampled` of which yield a token."""

    input_ids: NDArray[np.int64]  # [num_tokens]
    position_ids: NDArray[np.int64]  # [num_tokens]
    slot_mapping: NDArray[np.int64]  # [num_tokens], block * block_size + offset
    query_start: NDArray[np.int32]  # [num_seqs + 1]
    context_lens: NDArray[np.int32]  # [num_seqs]
    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks of this step]
    stays: NDArray[np.int64]  # [num_seqs], see `SequenceSlots`
    logits_indices: NDArray[np.int64]  # [num_sampled], packed tokens
    sampled_positions: NDArray[np.int64]  # [num_sampled], index in prompt + output of the token to come
    sampling: SlotRows  # num_sampled rows; the same object for as long as the same slots decode
    max_query_len: int
    max_context_len: int
    num_decodes: int = 0  # leading sequences with one token each
    edits: LogitEdits | None = None  # None: no sampled row asks for any
    scored: ScoredTokens | None = None
    pooled: PooledTokens | None = None
    masks: TokenMasks | None = None  # of the sampled rows that have a grammar
    following: "BatchInputs | None" = None  # foreseen; its first tokens are those that this step samples

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def behind(self, count: int) -> "BatchInputs":
        """The step without its first rows; needs a row behind them, and no extras."""
        num_tokens = int(self.query_start[count])
        num_sampled = int(np.searchsorted(self.logits_indices, num_tokens))
        return BatchInputs(
            input_ids=self.input_ids[num_tokens:],
            position_ids=self.position_ids[num_tokens:],
            slot_mapping=self.slot_mapping[num_tokens:],
            query_start=self.query_start[count:] - np.int32(num_tokens),
            context_lens=self.context_lens[count:],
            block_tables=self.block_tables[count:],
            stays=self.stays[count:],
            logits_indices=self.logits_indices[num_sampled:] - num_tokens,
            sampled_positions=self.sampled_positions[num_sampled:],
            sampling=self.sampling.behind(num_sampled),
            max_query_len=self.max_query_len,
            max_context_len=int(self.context_lens[count:].max()),
            num_decodes=max(self.num_decodes - count, 0),
        )


_NO_TABLES = np.zeros((0, 0), np.int32)


class BatchBuilder:
    """Builds `BatchInputs` from the slots' arrays."""

    def __init__(self, slots: SequenceSlots) -> None:
        self._slots = slots
        self._block_size = slots.block_size
        self._width = np.array(slots.block_size)  # an array: numpy takes twice as long to convert a number
        self._in_block = np.arange(slots.block_size)
        self._counting_32 = np.arange(slots.max_num_seqs + 1, dtype=np.int32)
        self._counting_64 = np.arange(max(slots.max_num_seqs, slots.max_len))
        self._decode: BatchInputs | None = None  # the last step of decodes
        self._block_ends = np.zeros(0, np.int64)  # of its rows, the position at which the next block begins
        self._page_shifts = np.zeros(0, np.int64)  # of its rows, see `_shifts`

    def build(self, plan: StepPlan) -> BatchInputs:
        """Gather a plan's tokens, positions, pages and sampling rows.

        While the same rows decode, the arrays of one step are those of the one before, written anew.
        """
        inputs = self._build_decode(plan) if plan.is_decode else self._build_mixed(plan)
        inputs.edits = self._edits(plan.sampled, inputs.sampled_positions)
        inputs.following = None if plan.following is None else self._build_following(plan.following)
        return inputs

    def _build_following(self, plan: StepPlan) -> BatchInputs:
        """A step whose decodes' tokens are not known yet, nor what depends on them."""
        inputs = self._build_mixed(plan)
        decodes = slice(plan.num_decodes)
        is_missing = plan.starts[decodes] >= self._slots.capacity[plan.slots[decodes]]
        inputs.slot_mapping[decodes][is_missing] = -1  # no block was free
        return inputs

    def _build_decode(self, plan: StepPlan) -> BatchInputs:
        rows, positions = plan.sampled, plan.starts
        if self._decode is None or self._decode.sampling is not rows:
            self._decode = self._decode_inputs(rows)
            self._block_ends = positions
        inputs = self._decode
        ends = inputs.sampled_positions
        np.add(positions, plan.num_new, out=ends)
        inputs.context_lens[:] = ends
        inputs.max_context_len = int(ends[ends.argmax()])
        if np.count_nonzero(positions >= self._block_ends):
            self._enter_blocks(inputs, positions)
        inputs.input_ids[:] = self._slots.flat_token_ids[rows.token_offsets + positions]
        inputs.position_ids[:] = positions
        np.add(self._page_shifts, positions, out=inputs.slot_mapping)
        return inputs

    def _decode_inputs(self, rows: SlotRows) -> BatchInputs:
        """With room for what changes from step to step."""
        num_rows = len(rows)
        input_ids, position_ids, slot_mapping, sampled_positions = np.empty((4, num_rows), np.int64)
        return BatchInputs(
            input_ids=input_ids,
            position_ids=position_ids,
            slot_mapping=slot_mapping,
            query_start=self._counting_32[: num_rows + 1],
            context_lens=np.empty(num_rows, np.int32),
            block_tables=_NO_TABLES,
            stays=self._slots.stays[rows.slots],
            logits_indices=self._counting_64[:num_rows],
            sampled_positions=sampled_positions,
            sampling=rows,
            max_query_len=1,
            max_context_len=0,
            num_decodes=num_rows,
        )

    def _enter_blocks(self, inputs: BatchInputs, positions: NDArray[np.int64]) -> None:
        """Some of the decodes begin a block: until the next one does, places follow positions, and tables stay."""
        self._page_shifts = self._shifts(inputs.sampling.block_offsets, positions)
        self._block_ends = positions - positions % self._width + self._width
        inputs.block_tables = self._block_tables(inputs.sampling.slots, inputs.max_context_len)

    def _build_mixed(self, plan: StepPlan) -> BatchInputs:
        assert plan.sampled_index is not None
        ends = plan.starts + plan.num_new
        # Decodes with drafts are chunks. The others are the first of the sampled rows, too.
        num_decodes = plan.num_decodes if plan.num_behind is None else 0
        lengths = plan.num_new[num_decodes:].tolist()
        query_start = np.empty(plan.num_rows + 1, np.int32)
        query_start[:num_decodes] = self._counting_32[:num_decodes]
        query_start[num_decodes:] = list(accumulate(lengths, initial=num_decodes))
        sampled_positions = ends[plan.sampled_index]
        logits_indices = query_start[1:][plan.sampled_index].astype(np.int64) - 1
        if plan.num_behind is not None:
            sampled_positions -= plan.num_behind
            logits_indices -= plan.num_behind
        max_context_len = int(ends[ends.argmax()])
        input_ids, position_ids, slot_mapping = self._mixed_tokens(plan, num_decodes, lengths)
        return BatchInputs(
            input_ids=input_ids,
            position_ids=position_ids,
            slot_mapping=slot_mapping,
            query_start=query_start,
            context_lens=ends.astype(np.int32),
            block_tables=self._block_tables(plan.slots, max_context_len),
            stays=self._slots.stays[plan.slots],
            logits_indices=logits_indices,
            sampled_positions=sampled_positions,
            sampling=plan.sampled,
            max_query_len=max(lengths, default=1),
            max_context_len=max_context_len,
            num_decodes=num_decodes + _num_leading_ones(lengths),
            scored=self._scored(plan, query_start) if self._slots.is_scoring else None,
            pooled=self._pooled(plan, query_start) if self._slots.pooling else None,
        )

    def _mixed_tokens(self, plan: StepPlan, num_decodes: int, lengths: list[int]) -> NDArray[np.int64]:
        """`[3, num_tokens]`: ids, positions and places of the decodes' tokens and of the chunks with these lengths."""
        tokens = np.empty((3, plan.num_tokens), np.int64)
        if num_decodes:
            self._write_decodes(tokens[:, :num_decodes], plan.sampled, plan.starts[:num_decodes])
        first = num_decodes
        slots, starts = plan.slots[num_decodes:].tolist(), plan.starts[num_decodes:].tolist()
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            self._write_chunk(tokens[:, first : first + length], slot, start)
            first += length
        return tokens

    def _write_decodes(self, tokens: NDArray[np.int64], rows: SlotRows, starts: NDArray[np.int64]) -> None:
        """Into `[3, num_rows]`: id, position and place of the token at `starts[i]` of row i; there may be more rows."""
        num_rows = len(starts)
        tokens[0] = self._slots.flat_token_ids[rows.token_offsets[:num_rows] + starts]
        tokens[1] = starts
        tokens[2] = self._pages(rows.block_offsets[:num_rows], starts)

    def _write_chunk(self, tokens: NDArray[np.int64], slot: int, start: int) -> None:
        """Into `[3, num_tokens]`: ids, positions and places of a slot's tokens from `start` on."""
        end = start + tokens.shape[1]
        first_block = start // self._block_size
        blocks = self._slots.block_tables[slot, first_block : -(-end // self._block_size)].astype(np.int64)
        places = (blocks[:, None] * self._width + self._in_block).reshape(-1)
        tokens[0] = self._slots.token_ids[slot, start:end]
        tokens[1] = self._counting_64[start:end]
        tokens[2] = places[start - first_block * self._block_size :][: end - start]

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

    def _pooled(self, plan: StepPlan, query_start: NDArray[np.int32]) -> PooledTokens | None:
        """The plan's tokens that their sequences' poolers wait for."""
        slots: list[int] = []
        indices: list[NDArray[np.int64]] = []
        for row, slot in enumerate(plan.slots.tolist()):
            if slot not in self._slots.pooling or (pooler := self._slots.sequences[slot].pooler) is None:
                continue
            num_passed = max(0, pooler.num_passed - int(plan.starts[row]))
            wanted = np.arange(query_start[row] + num_passed, query_start[row + 1])
            slots += [slot] * len(wanted)
            indices.append(wanted)
        return PooledTokens(np.array(slots, np.int64), np.concatenate(indices)) if slots else None

    def _pages(self, block_offsets: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the keys and values of each token lie in the cache."""
        places = self._shifts(block_offsets, positions)
        places += positions
        return places

    def _shifts(self, block_offsets: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How far the place of each token in the cache is from its position: the same for all tokens of its block."""
        index = positions // self._width
        blocks: NDArray[np.int64] = self._slots.flat_block_tables[block_offsets + index].astype(np.int64)
        blocks -= index
        blocks *= self._width
        return blocks

    def _block_tables(self, slots: NDArray[np.int64], max_context_len: int) -> NDArray[np.int32]:
        max_blocks = -(-max_context_len // self._block_size)
        return self._slots.block_tables[slots, :max_blocks]


def _num_leading_ones(lengths: list[int]) -> int:
    return next((i for i, length in enumerate(lengths) if length != 1), len(lengths))
