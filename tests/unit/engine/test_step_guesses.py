"""What is taken of a step that was computed ahead: rows of the same sequences, with the same places and tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.batch_inputs import BatchInputs
from engine.runner.step_ahead import StepAhead, Taken
from engine.runner.step_budget import plain_rows

# Three decodes, then a prompt's chunk of four tokens whose last one samples.
SEQUENCES, DECODE_SLOTS, DECODE_TOKENS = [11, 12, 13], [5, 21, 34], [7, 8, 9]
CHUNK_SEQUENCE, CHUNK_SLOTS = 14, [40, 41, 42, 43]


def step(
    sequences: list[int],
    slots: list[int],
    tokens: list[int],
    *,
    chunk_sequence: int | None = CHUNK_SEQUENCE,
    chunk_slots: list[int] = CHUNK_SLOTS,
) -> BatchInputs:
    lengths = [1] * len(sequences) + ([] if chunk_sequence is None else [len(chunk_slots)])
    all_slots = slots + ([] if chunk_sequence is None else chunk_slots)
    query_start = np.cumsum([0, *lengths]).astype(np.int32)
    return BatchInputs(
        input_ids=np.array(tokens + [100 + slot for slot in all_slots[len(slots) :]]),
        position_ids=np.array(all_slots),
        slot_mapping=np.array(all_slots),
        query_start=query_start,
        context_lens=np.array([slot + 1 for slot in all_slots])[query_start[1:] - 1].astype(np.int32),
        block_tables=np.zeros((len(lengths), 1), np.int32),
        stays=np.array(sequences + ([] if chunk_sequence is None else [chunk_sequence])),
        logits_indices=query_start[1:].astype(np.int64) - 1,
        sampled_positions=np.zeros(len(lengths), np.int64),
        sampling=plain_rows(len(lengths)),
        max_query_len=max(lengths),
        max_context_len=64,
        num_decodes=len(sequences),
    )


def take(inputs: BatchInputs) -> Taken[str] | None:
    """What is taken for these inputs of a guess at the three decodes and the chunk."""
    ahead: StepAhead[str] = StepAhead(lambda guess, token_ids: "computed")
    before = step(SEQUENCES, [slot - 1 for slot in DECODE_SLOTS], [1, 2, 3])
    before.following = step(SEQUENCES, DECODE_SLOTS, [0, 0, 0])
    ahead.launch(before, torch.tensor(DECODE_TOKENS))
    ahead.expect(np.array(DECODE_TOKENS))
    return ahead.take(inputs)


def rows_of(taken: Taken[str] | None) -> list[int] | None:
    if taken is None or taken.rows is None:
        return None if taken is None else [0, 1, 2, 3]
    rows: NDArray[np.int64] = taken.rows
    return [int(row) for row in rows]


def test_a_guess_that_came_true_is_taken_whole() -> None:
    taken = take(step(SEQUENCES, DECODE_SLOTS, DECODE_TOKENS))
    assert taken is not None and taken.rows is None and taken.rest is None


def test_decodes_may_have_ended_or_come_in_another_order() -> None:
    taken = take(step([13, 11], [34, 5], [9, 7]))
    assert rows_of(taken) == [2, 0, 3] and taken is not None and taken.rest is None


@pytest.mark.parametrize(
    ("sequence", "slot", "token"),
    [
        (99, 34, 9),  # a newcomer that got the place of one that ended
        (13, 24, 9),  # another place: it was preempted, or there was no block for the guess
        (13, 34, 6),  # another token than was sampled
    ],
)
def test_from_the_first_decode_on_that_was_not_guessed_all_is_computed(sequence: int, slot: int, token: int) -> None:
    taken = take(step([11, sequence, 12], [5, slot, 21], [7, token, 8]))
    assert rows_of(taken) == [0] and taken is not None and taken.rest is not None
    assert taken.rest.stays.tolist() == [sequence, 12, 14]


def test_a_row_of_one_token_that_samples_none_is_no_decode_that_was_guessed() -> None:
    """As of a sequence whose grammar forces more tokens than the step has room for."""
    inputs = step(SEQUENCES, DECODE_SLOTS, DECODE_TOKENS, chunk_sequence=None)
    taken = take(replace(inputs, logits_indices=np.array([0, 2]), sampling=plain_rows(2)))
    assert rows_of(taken) == [0] and taken is not None and taken.rest is not None
    assert taken.rest.logits_indices.tolist() == [1]


@pytest.mark.parametrize(
    ("sequence", "slots"),
    [
        (98, CHUNK_SLOTS),  # another's prompt
        (14, [50, 51, 52, 53]),  # it begins anew, elsewhere
        (14, [40, 41, 42]),  # a shorter chunk
    ],
)
def test_a_chunk_that_was_not_guessed_is_computed_behind_the_decodes(sequence: int, slots: list[int]) -> None:
    taken = take(step(SEQUENCES, DECODE_SLOTS, DECODE_TOKENS, chunk_sequence=sequence, chunk_slots=slots))
    assert rows_of(taken) == [0, 1, 2] and taken is not None and taken.rest is not None
    assert taken.rest.stays.tolist() == [sequence]


def test_a_chunk_is_taken_where_all_decodes_before_it_ended() -> None:
    assert rows_of(take(step([], [], []))) == [3]


def test_nothing_is_taken_of_a_guess_for_others_or_for_a_step_that_scores() -> None:
    assert take(step([99], [5], [7], chunk_sequence=None)) is None
    scoring = step(SEQUENCES, DECODE_SLOTS, DECODE_TOKENS)
    assert take(replace(scoring, scored=object())) is None  # type: ignore[arg-type]


def test_a_forward_that_raises_ahead_of_its_turn_is_no_guess_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def fail(guess: BatchInputs, token_ids: Tensor) -> str:
        raise ValueError("a sequence at fault")

    ahead: StepAhead[str] = StepAhead(fail)
    before = step(SEQUENCES, DECODE_SLOTS, DECODE_TOKENS)
    before.following = before
    ahead.launch(before, torch.tensor(DECODE_TOKENS))
    ahead.expect(np.array(DECODE_TOKENS))
    assert ahead.take(before) is None
    assert "action=step_ahead_failed reason='a sequence at fault'" in caplog.text
