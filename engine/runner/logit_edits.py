"""What the requests in the slots change about their logits, as sparse arrays: biases, penalties, forbidden ends.

Owns which slots ask for what, and what of it does not change from step to step. Knows nothing of torch; the edits are
made in `engine.logit_editor`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.runner.token_counts import TokenCounts
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class EditRows:
    """What is constant about some slots' edits; rows are places among these slots."""

    bias_rows: NDArray[np.int64]  # [num_biases]
    bias_ids: NDArray[np.int64]
    biases: NDArray[np.float32]
    penalized_rows: NDArray[np.int64]  # [num_penalized]
    penalized_slots: NDArray[np.int64]
    repetition: NDArray[np.float32]  # [num_penalized]
    frequency: NDArray[np.float32]
    presence: NDArray[np.float32]
    end_rows: NDArray[np.int64]  # [num_ends]: the stop tokens of sequences with min_tokens
    end_ids: NDArray[np.int64]
    end_positions: NDArray[np.int64]  # from here on the token is allowed


@dataclass(frozen=True, slots=True, eq=False)
class LogitEdits:
    """One step's edits; rows are rows of its sampled logits. Within a kind, no logit is named twice."""

    rows: EditRows
    owners: NDArray[np.int64]  # [num_entries], places among the penalized rows
    token_ids: NDArray[np.int64]  # [num_entries]
    counts: NDArray[np.float32]  # [num_entries], how often the output holds the token
    end_rows: NDArray[np.int64]  # [num_ends], of those that are forbidden still
    end_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Wishes:
    """What one slot's request asks for, as arrays from its beginning on: rows are gathered often."""

    params: SamplingParams
    bias_ids: NDArray[np.int64]
    biases: NDArray[np.float32]
    end_ids: NDArray[np.int64]
    end_position: int
    is_penalized: bool


class EditTable:
    """What the slots' requests ask for; one that asks for nothing costs a look into a dictionary as rows are made."""

    def __init__(self, token_ids: NDArray[np.int32]) -> None:
        """`token_ids`: the slots' token table, int32 `[num_slots, max_len]`."""
        self._token_ids = token_ids
        self._counts: TokenCounts | None = None  # made for the first that needs it
        self._wishes: dict[int, _Wishes] = {}  # by slot

    def open(self, slot: int, sequence: Sequence) -> None:
        """A sequence has got a slot, and its tokens stand in the table."""
        params = sequence.params
        is_penalized = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
        if is_penalized:
            self._counts = self._counts or TokenCounts(self._token_ids)
            self._counts.open(
                slot,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_tokens=sequence.num_tokens,
                with_prompt=params.repetition_penalty != 1,
            )
        if is_penalized or params.logit_bias or params.min_tokens:
            self._wishes[slot] = _Wishes(
                params=params,
                bias_ids=np.array([token_id for token_id, _ in params.logit_bias], np.int64),
                biases=np.array([bias for _, bias in params.logit_bias], np.float32),
                end_ids=np.array(sorted(set(sequence.early_stop_ids)), np.int64),
                end_position=min(sequence.num_prompt_tokens + params.min_tokens, sequence.finish_rule.max_total_tokens),
                is_penalized=is_penalized,
            )

    def close(self, slot: int) -> None:
        self._wishes.pop(slot, None)

    def rows(self, slots: NDArray[np.int64]) -> EditRows | None:
        """None if none of the slots asks for any."""
        if not self._wishes:
            return None
        places = [row for row, slot in enumerate(slots.tolist()) if slot in self._wishes]
        if not places:
            return None
        rows = np.array(places, np.int64)
        wishes = [self._wishes[slot] for slot in slots[rows].tolist()]
        penalized = [wish.params for wish in wishes if wish.is_penalized]
        penalized_rows = rows[[wish.is_penalized for wish in wishes]]
        num_ends = [len(wish.end_ids) for wish in wishes]
        return EditRows(
            bias_rows=np.repeat(rows, [len(wish.bias_ids) for wish in wishes]),
            bias_ids=np.concatenate([wish.bias_ids for wish in wishes]),
            biases=np.concatenate([wish.biases for wish in wishes]),
            penalized_rows=penalized_rows,
            penalized_slots=slots[penalized_rows],
            repetition=np.array([params.repetition_penalty for params in penalized], np.float32),
            frequency=np.array([params.frequency_penalty for params in penalized], np.float32),
            presence=np.array([params.presence_penalty for params in penalized], np.float32),
            end_rows=np.repeat(rows, num_ends),
            end_ids=np.concatenate([wish.end_ids for wish in wishes]),
            end_positions=np.repeat([wish.end_position for wish in wishes], num_ends),
        )

    def edits(self, rows: EditRows, positions: NDArray[np.int64]) -> LogitEdits:
        """The edits of one step that samples the tokens at `positions`, int64, one for each row of the step."""
        owners = token_ids = np.zeros(0, np.int64)
        counts = np.zeros(0, np.float32)
        if self._counts is not None and len(rows.penalized_rows):
            self._counts.advance(rows.penalized_slots, positions[rows.penalized_rows])
            owners, token_ids, counts = self._counts.entries(rows.penalized_slots)
        is_early = positions[rows.end_rows] < rows.end_positions
        return LogitEdits(rows, owners, token_ids, counts, rows.end_rows[is_early], rows.end_ids[is_early])
