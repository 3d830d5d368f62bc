"""The running sequences as arrays: one row a slot, so that a step's bookkeeping is numpy and not a loop.

Owns the token table, the block tables, the counters and the sampling parameters of every slot, and which slots are
taken. Knows nothing of who gets a slot (the scheduler) or which block is whose (the KV cache manager). No torch.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from engine.messages import StepOutput
from engine.runner.logit_edits import EditRows, EditTable
from engine.sampling_params import has_filter
from engine.sequence import Sequence

STOP_TABLE_WIDTH = 8  # stop tokens compared at once; a sequence with more is looked at by itself
NO_TOKEN = -2  # pads the stop table; no sampler gives it
MAX_TOP_K = int(np.iinfo(np.int32).max)  # no vocabulary has so many tokens: all of them, whatever a sampler counts with


@dataclass(slots=True, kw_only=True, eq=False)  # not frozen: that alone would cost a quarter of gathering them
class SlotRows:
    """What does not change from step to step about some slots, gathered once; arrays are `[num_rows]`."""

    slots: NDArray[np.int64]
    sequence_ids: NDArray[np.int64]
    max_totals: NDArray[np.int64]
    stop_ids: NDArray[np.int32]  # [num_stops, num_rows], padded with NO_TOKEN
    long_stops: list[tuple[int, frozenset[int]]]  # (row, stop tokens) where the table was too narrow
    constrained: NDArray[np.int64]  # [num_constrained], rows with a grammar
    token_offsets: NDArray[np.int64]  # of the slot's row in the flat token table
    block_offsets: NDArray[np.int64]  # of the slot's row in the flat block tables
    temperature: NDArray[np.float32]
    top_p: NDArray[np.float32]
    top_k: NDArray[np.int64]  # 0 is off
    min_p: NDArray[np.float32]
    seed: NDArray[np.int64]
    choice: NDArray[np.int64]
    edits: EditRows | None = None  # None: no row asks for any
    logprob_rows: NDArray[np.int64] | None = None  # rows whose log-probabilities are wanted; None: no row's
    num_top: int = 0  # likeliest tokens wanted beside each of them, at most

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def has_filter(self) -> NDArray[np.bool_]:
        """`[num_rows]`: whether the token is drawn, and from fewer than all."""
        result: NDArray[np.bool_] = (self.temperature > 0) & has_filter(self.top_p, self.top_k, self.min_p)
        return result

    @property
    def is_plain(self) -> bool:
        """Whether all that is asked of these rows is tokens, drawn from logits as they are."""
        return self.edits is None and self.logprob_rows is None and not len(self.constrained)

    def behind(self, count: int) -> "SlotRows":
        """The rows behind the first ones: what a sampler asks about them, where nobody asks for more."""
        names = ("slots", "sequence_ids", "temperature", "top_p", "top_k", "min_p", "seed", "choice")
        return replace(self, **{name: getattr(self, name)[count:] for name in names})


class SequenceSlots:
    """`max_num_seqs` rows of at most `max_len` tokens. The big tables cost memory only where they are touched."""

    def __init__(self, *, max_num_seqs: int, max_len: int, block_size: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_len = max_len
        self.block_size = block_size
        self.max_blocks = -(-max_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_len), np.int32)
        self.block_tables = np.zeros((max_num_seqs, self.max_blocks), np.int32)
        self.flat_token_ids = self.token_ids.reshape(-1)
        self.flat_block_tables = self.block_tables.reshape(-1)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)  # tokens whose keys and values lie in the cache
        self.capacity = np.zeros(max_num_seqs, np.int64)  # tokens that its blocks hold
        self.is_decoding = np.zeros(max_num_seqs, np.bool_)  # everything but the last token is computed
        # Constants of a slot's sequence, a row a noun, so that `rows` gathers all of a kind at once.
        self._integers = np.zeros((7, max_num_seqs), np.int64)
        self.sequence_id, self._max_total, self._top_k, self._seed, self._choice = self._integers[:5]
        self._integers[5] = np.arange(max_num_seqs) * self.max_len
        self._integers[6] = np.arange(max_num_seqs) * self.max_blocks
        self._fractions = np.zeros((3, max_num_seqs), np.float32)
        self._temperature, self._top_p, self._min_p = self._fractions
        self._stop_ids = np.full((STOP_TABLE_WIDTH, max_num_seqs), NO_TOKEN, np.int32)
        self._num_stops = 0  # rows of the stop table that were ever written
        self._long_stops: dict[int, frozenset[int]] = {}
        self._constrained: set[int] = set()  # slots whose sequence has a grammar
        self.edits = EditTable(self.token_ids)
        self._num_top: dict[int, int] = {}  # by slot, where log-probabilities are wanted
        # Prompt positions from which the next token is still to be scored lie in [score_starts, score_ends).
        self._scored: set[int] = set()  # slots with such positions when they were acquired
        self.score_starts = np.zeros(max_num_seqs, np.int64)
        self.score_ends = np.zeros(max_num_seqs, np.int64)
        self.pooling: set[int] = set()  # slots whose sequences are there for their embeddings
        self.sequences: dict[int, Sequence] = {}  # taken slots
        self.stays = np.zeros(max_num_seqs, np.int64)  # of whoever took a slot last: which stay in any slot that is
        self._num_stays = 0
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._decoding_slots = np.zeros(0, np.int64)
        self._decoding: SlotRows | None = None  # theirs; None: not gathered yet
        self._has_stopped = False  # some of them decode no more
        self._least_urgent: Sequence | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def is_scoring(self) -> bool:
        """Whether prompt tokens of some slot may be still to be scored."""
        return bool(self._scored)

    def num_uncomputed(self, slots: list[int]) -> int:
        """Tokens of these slots that no step computed yet."""
        return int((self.num_tokens[slots] - self.num_computed[slots]).sum())

    def acquire(self, sequence: Sequence) -> int:
        """Give the sequence a slot and write its row; no blocks, nothing computed. Needs a free slot."""
        slot = self._free.pop()
        num_tokens = sequence.num_tokens
        self.sequences[slot] = sequence
        self._num_stays += 1
        self.stays[slot] = self._num_stays
        sequence.slot = slot
        self.token_ids[slot, :num_tokens] = sequence.token_ids
        self.num_tokens[slot] = num_tokens
        self.num_computed[slot] = 0
        self.capacity[slot] = 0
        if sequence.grammar is not None:
            self._constrained.add(slot)
        if sequence.pooler is not None:
            self.pooling.add(slot)
        self.sequence_id[slot] = sequence.sequence_id
        self._max_total[slot] = sequence.finish_rule.max_total_tokens
        self._write_stops(slot, sequence.finish_rule.stop_token_ids)
        self._write_sampling(slot, sequence)
        if self._least_urgent is not None and sequence.urgency > self._least_urgent.urgency:
            self._least_urgent = sequence
        self._write_scoring(slot, sequence)
        self.edits.open(slot, sequence)
        return slot

    def release(self, slot: int) -> Sequence:
        """Free the slot; the sequence takes its tokens along."""
        sequence = self.sequences.pop(slot)
        sequence.token_ids = self.token_ids[slot, : self.num_tokens[slot]].copy()
        sequence.num_scored = int(self.score_starts[slot])
        sequence.slot = None
        if sequence is self._least_urgent:
            self._least_urgent = None
        self._scored.discard(slot)
        self.pooling.discard(slot)
        self._num_top.pop(slot, None)
        self.edits.close(slot)
        self._constrained.discard(slot)
        self._long_stops.pop(slot, None)
        self._free.append(slot)
        self.stop_decoding(slot)
        return sequence

    def extend(self, slot: int, token_ids: list[int]) -> StepOutput:
        """Append output tokens to the slot's sequence, up to the one that ends it, and report them."""
        num_tokens = int(self.num_tokens[slot])
        taken = self.sequences[slot].report(token_ids, num_tokens)
        self.num_tokens[slot] += len(taken.token_ids)
        self.token_ids[slot, num_tokens : self.num_tokens[slot]] = taken.token_ids
        return taken

    def stop_decoding(self, slot: int) -> None:
        """More than the slot's last token is to be computed, or its sequence is gone."""
        if self.is_decoding[slot]:
            self.is_decoding[slot] = False
            self._has_stopped = True

    def start_decoding(self, rows: SlotRows) -> None:
        """These are all that decode now: those that did, and slots whose prompt is computed."""
        self.is_decoding[rows.slots] = True
        self._decoding_slots, self._decoding, self._has_stopped = rows.slots, rows, False

    def decoding_slots(self) -> NDArray[np.int64]:
        """The slots that decode, in the order in which they began to."""
        if self._has_stopped:
            self._decoding_slots = self._decoding_slots[self.is_decoding[self._decoding_slots]]
            self._decoding, self._has_stopped = None, False
        return self._decoding_slots

    def decoding(self) -> SlotRows:
        """Their rows; the same object for as long as they are the same."""
        slots = self.decoding_slots()
        if self._decoding is None:
            self._decoding = self.rows(slots)
        return self._decoding

    def least_urgent(self) -> Sequence:
        """The first to make room for others. Needs one to run."""
        if self._least_urgent is None:
            self._least_urgent = max(self.sequences.values(), key=attrgetter("urgency"))
        return self._least_urgent

    def rows(self, slots: NDArray[np.int64]) -> SlotRows:
        """Gather what is constant about some slots."""
        sequence_ids, max_totals, top_k, seed, choice, token_offsets, block_offsets = self._integers.take(slots, axis=1)
        temperature, top_p, min_p = self._fractions.take(slots, axis=1)
        wanting = self._rows_of(slots, self._num_top)
        return SlotRows(
            slots=slots,
            sequence_ids=sequence_ids,
            max_totals=max_totals,
            stop_ids=self._stop_ids[: self._num_stops].take(slots, axis=1),
            long_stops=[(row, self._long_stops[slot]) for row, slot in self._rows_of(slots, self._long_stops)],
            constrained=np.array([row for row, _ in self._rows_of(slots, self._constrained)], np.int64),
            token_offsets=token_offsets,
            block_offsets=block_offsets,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            choice=choice,
            edits=self.edits.rows(slots),
            logprob_rows=np.array([row for row, _ in wanting], np.int64) if wanting else None,
            num_top=max((self._num_top[slot] for _, slot in wanting), default=0),
        )

    @staticmethod
    def _rows_of(slots: NDArray[np.int64], wanted: Collection[int]) -> list[tuple[int, int]]:
        """(row, slot) of those slots that are among the wanted, which are few and mostly none."""
        return [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in wanted] if wanted else []

    def _write_stops(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        if len(stop_token_ids) > STOP_TABLE_WIDTH:
            self._long_stops[slot] = frozenset(stop_token_ids)
            stop_token_ids = ()
        self._num_stops = max(self._num_stops, len(stop_token_ids))
        self._stop_ids[: self._num_stops, slot] = NO_TOKEN
        for i, token_id in enumerate(stop_token_ids):
            self._stop_ids[i, slot] = token_id

    def _write_sampling(self, slot: int, sequence: Sequence) -> None:
        params = sequence.params
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = min(params.top_k or 0, MAX_TOP_K)
        self._min_p[slot] = params.min_p
        self._seed[slot] = _as_int64(params.seed)
        self._choice[slot] = sequence.choice_index

    def _write_scoring(self, slot: int, sequence: Sequence) -> None:
        if sequence.params.logprobs is not None:
            self._num_top[slot] = sequence.params.logprobs
        self.score_starts[slot] = sequence.num_scored
        self.score_ends[slot] = sequence.num_to_score
        if sequence.num_scored < sequence.num_to_score:
            self._scored.add(slot)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every slot is either free or held by one sequence that knows it."""
        taken = set(self.sequences)
        assert len(self._free) == len(set(self._free)), "a slot is free twice"
        assert taken.isdisjoint(self._free), "a slot is free and taken"
        assert len(taken) + len(self._free) == self.max_num_seqs, "a slot is lost"
        assert all(sequence.slot == slot for slot, sequence in self.sequences.items())
        decoding = self.decoding_slots().tolist()
        assert set(decoding) <= taken, "a free slot decodes"
        assert sorted(decoding) == np.flatnonzero(self.is_decoding).tolist(), (
            "the decoding rows are not those marked so"
        )


def _as_int64(seed: int) -> int:
    """Seeds are equal modulo 2**64; wrap into the signed range that torch has."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
