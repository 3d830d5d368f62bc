"""Computes a step before the one before it is read, so that the device never waits for the host.

While the host reads step N, books its tokens and plans step N + 1, the device computes step N + 1 already, from the
tokens that lie on it. That is a guess at the plan, the one that was foreseen (`engine.step_forecast`): all sequences go
on, and so do the prompts of which step N computed a part. The plan that comes takes from it what was guessed right, row
by row, since a row does not depend on the others: prompts that came meanwhile are then computed in a step of their own,
which costs a device no more than in one with the decodes, unless they are short. Likewise what lies behind a decode
that was not guessed. A guess writes keys and values only where its sequences' next tokens go: whoever has the place
then writes it again before anybody reads it. Knows nothing of models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.batch_inputs import BatchInputs

T = TypeVar("T")  # what a forward gives, a row for each that is sampled


@dataclass(slots=True, eq=False)
class _Guess(Generic[T]):
    inputs: BatchInputs  # but for the decodes' token ids, which lie on the device
    computed: T
    expected_ids: NDArray[np.int64] | None = None  # of its decodes, once they are read: `[num_decodes]`


@dataclass(frozen=True, slots=True, eq=False)
class Taken(Generic[T]):
    """What was computed of a step's first rows, and what of it is left to compute."""

    computed: T
    rows: NDArray[np.int64] | None  # of what was computed, those that the step samples first; None: all, as they are
    rest: BatchInputs | None


class StepAhead(Generic[T]):
    """At most one step that is computed but not asked for yet."""

    def __init__(self, forward: Callable[[BatchInputs, Tensor], T]) -> None:
        """`forward`: launches a step that begins with these tokens, int64 on the device."""
        self._forward = forward
        self._guess: _Guess[T] | None = None

    def take(self, inputs: BatchInputs) -> Taken[T] | None:
        """What of a step is computed already; None if nothing is."""
        guess, self._guess = self._guess, None
        if guess is None or guess.expected_ids is None or inputs.scored is not None:
            return None
        num_guessed = len(guess.expected_ids)
        rows = _right_decodes(guess, inputs)
        num_rows = len(rows)
        if _has_right_chunks(guess, inputs, num_rows):
            rows = np.concatenate((rows, np.arange(num_guessed, len(guess.inputs.logits_indices))))
            num_rows += guess.inputs.num_seqs - num_guessed
        if not num_rows:
            return None
        rest = inputs.behind(num_rows) if inputs.num_seqs > num_rows else None
        is_all = np.array_equal(rows, np.arange(len(guess.inputs.logits_indices)))
        return Taken(guess.computed, None if is_all else rows, rest)

    def launch(self, inputs: BatchInputs, token_ids: Tensor) -> None:
        """Compute what is foreseen to follow `inputs`, which samples `token_ids`."""
        following = inputs.following
        if following is None:
            return
        try:
            computed = self._forward(following, token_ids.clamp(min=0))  # a failed row's token is none
        except torch.AcceleratorError:
            raise
        except Exception:  # memory, or a sequence at fault: the step itself says so when its turn comes
            return
        self._guess = _Guess(following, computed)

    def expect(self, token_ids: NDArray[np.int64]) -> None:
        """What the step before the guess sampled, now that it is read."""
        if self._guess is not None:
            self._guess.expected_ids = token_ids


def _right_decodes(guess: _Guess[T], inputs: BatchInputs) -> NDArray[np.int64]:
    """The guess's rows of the inputs' first decodes, up to one that it lacks or has with another token or place."""
    assert guess.expected_ids is not None
    num_guessed = len(guess.expected_ids)
    sampled = inputs.logits_indices[: inputs.num_decodes]
    count = _num_leading(sampled == np.arange(len(sampled)))
    if not count or not num_guessed:
        return np.zeros(0, np.int64)
    ids, wanted = guess.inputs.sequence_ids[:num_guessed], inputs.sequence_ids[:count]
    order = ids.argsort()
    places = np.searchsorted(ids, wanted, sorter=order)
    rows: NDArray[np.int64] = order[np.minimum(places, num_guessed - 1)]
    pairs = (
        (ids, wanted),
        (guess.inputs.position_ids, inputs.position_ids),
        (guess.inputs.slot_mapping, inputs.slot_mapping),
        (guess.expected_ids, inputs.input_ids),
    )
    return rows[: _num_leading(np.logical_and.reduce([guessed[rows] == actual[:count] for guessed, actual in pairs]))]


def _has_right_chunks(guess: _Guess[T], inputs: BatchInputs, first: int) -> bool:
    """Whether the guess has chunks, and the inputs have all of them from this row on, which decodes alone precede."""
    assert guess.expected_ids is not None
    num_guessed = len(guess.expected_ids)
    end = first + guess.inputs.num_seqs - num_guessed
    if not first < end <= inputs.num_seqs:
        return False
    guessed_rows, rows = slice(num_guessed, None), slice(first, end)
    guessed_tokens, tokens = slice(num_guessed, None), slice(first, int(inputs.query_start[end]))
    pairs = (
        (guess.inputs.sequence_ids[guessed_rows], inputs.sequence_ids[rows]),
        (guess.inputs.context_lens[guessed_rows], inputs.context_lens[rows]),
        (guess.inputs.position_ids[guessed_tokens], inputs.position_ids[tokens]),
        (guess.inputs.slot_mapping[guessed_tokens], inputs.slot_mapping[tokens]),
        (guess.inputs.input_ids[guessed_tokens], inputs.input_ids[tokens]),
    )
    return all(np.array_equal(guessed, actual) for guessed, actual in pairs)


def _num_leading(is_right: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(is_right) if is_right.all() else int(is_right.argmin())
