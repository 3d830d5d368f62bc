"""Computes a step before the one before it is read, so that the device never waits for the host.

While the host reads step N, books its tokens and plans step N + 1, the device computes step N + 1 already, from the
tokens that lie on it. That is a guess at the plan, the one that was foreseen (`engine.step_forecast`): all sequences go
on, and so do the prompts of which step N computed a part. The plan that comes takes from it what was guessed right, row
by row, since a row does not depend on the others: prompts that came meanwhile are then computed in a step of their own,
which costs a device no more than in one with the decodes, unless they are short. Likewise what lies behind a decode
that was not guessed. A guess writes keys and values only where its sequences' next tokens go: whoever has the place
then writes it again before anybody reads it. Knows nothing of models.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import DeviceLostError
from engine.runner.batch_inputs import BatchInputs
from engine.runner.device_errors import is_of_device, is_of_memory

logger = logging.getLogger(__name__)

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
        if guess is None or guess.expected_ids is None or inputs.scored is not None or inputs.pooled is not None:
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
        except DeviceLostError:  # with other ranks within the forward
            raise
        except Exception as error:  # memory, or a sequence at fault: the step itself says so when its turn comes
            if is_of_device(error) and not is_of_memory(error):
                raise
            logger.warning("action=step_ahead_failed reason=%r", str(error).partition("\n")[0])
            return
        self._guess = _Guess(following, computed)

    def expect(self, token_ids: NDArray[np.int64]) -> None:
        """What the step before the guess sampled, now that it is read."""
        if self._guess is not None:
            self._guess.expected_ids = token_ids


def _right_decodes(guess: _Guess[T], inputs: BatchInputs) -> NDArray[np.int64]:
    """The guess's rows of the inputs' first decodes, up to one that it lacks or has with another token or place.

    A place belongs to one sequence at a time, and to one position of it while it stays in its slot: then the rest of
    such a row is right as well. A row of one token that samples none is no decode: a grammar forces more, for which the
    step has no room.
    """
    assert guess.expected_ids is not None
    sampled = inputs.logits_indices[: inputs.num_decodes]
    num_guessed, count = len(guess.expected_ids), _num_leading(sampled == np.arange(len(sampled)))
    if not num_guessed:
        return np.zeros(0, np.int64)
    stays, wanted = guess.inputs.stays[:num_guessed], inputs.stays[:count]
    order = stays.argsort()
    places = np.searchsorted(stays, wanted, sorter=order)
    rows: NDArray[np.int64] = order[np.minimum(places, num_guessed - 1)]
    is_right = (
        (stays[rows] == wanted)
        & (guess.inputs.slot_mapping[rows] == inputs.slot_mapping[:count])
        & (guess.expected_ids[rows] == inputs.input_ids[:count])
    )
    return rows[: _num_leading(is_right)]


def _has_right_chunks(guess: _Guess[T], inputs: BatchInputs, first: int) -> bool:
    """Whether the inputs have all chunks of the guess, if any, from this row on, which decodes alone precede.

    A prompt's tokens do not change, so its chunk is the same where its places are, unless it left its slot in between:
    it may have come back to these blocks with another part of the prompt, or behind blocks with other contents.
    """
    assert guess.expected_ids is not None
    chunks = slice(len(guess.expected_ids), None)
    wanted = guess.inputs.stays[chunks]
    end = first + len(wanted)
    if not np.array_equal(wanted, inputs.stays[first:end]):
        return False
    places = inputs.slot_mapping[first : int(inputs.query_start[end])]
    return np.array_equal(guess.inputs.slot_mapping[chunks], places)


def _num_leading(is_right: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(is_right) if is_right.all() else int(is_right.argmin())
