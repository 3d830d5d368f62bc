"""Computes a step of decodes before the one before it is read, so that the device never waits for the host.

While the host reads step N, books its tokens and plans step N + 1, the device computes step N + 1 already, from the
tokens that lie on it. That is a guess at the plan: the same sequences, each one token on. The plan that comes takes
from it what was guessed right, row by row, since a row does not depend on the others; if it needs anything else, the
guess is dropped and the step is computed as planned. A guess writes keys and values only where its sequences' next
tokens go: whoever has the place then writes it again before anybody reads it. Knows nothing of models.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.batch_inputs import BatchInputs
from engine.runner.transfer import HostToDevice

Forward = Callable[[BatchInputs, Tensor], Tensor]


@dataclass(slots=True, eq=False)
class _Guess:
    inputs: BatchInputs  # but for the token ids, which lie on the device
    token_ids: Tensor  # int64 [num_seqs], what it sampled
    expected_ids: NDArray[np.int64] | None = None  # its input tokens, once they are read


class StepAhead:
    """At most one step of decodes that is computed but not asked for yet."""

    def __init__(self, forward: Forward, to_device: HostToDevice) -> None:
        """`forward`: launches a step with these input tokens and returns what it samples, both int64 on the device."""
        self._forward = forward
        self._to_device = to_device
        self._guess: _Guess | None = None
        self._num_decodes = 0  # steps of decodes in a row

    def take(self, inputs: BatchInputs) -> Tensor | None:
        """The tokens of a step, int64 `[num_seqs]` on the device, if they are computed already."""
        guess, self._guess = self._guess, None
        self._num_decodes = self._num_decodes + 1 if _is_plain_decode(inputs) else 0
        if guess is None or guess.expected_ids is None or not self._num_decodes:
            return None
        rows = _find_rows(guess.inputs, inputs)
        if rows is None or not _is_same(guess, inputs, rows):
            return None
        if len(rows) == guess.inputs.num_seqs:
            return guess.token_ids
        return guess.token_ids[self._to_device.send(rows)[0]]

    def launch(self, inputs: BatchInputs, token_ids: Tensor) -> None:
        """Compute the step after `inputs`, which samples `token_ids`, if it is likely to be decodes again."""
        # The first decode after a prefill is often followed by another prefill: a guess would be computed for nothing.
        if self._num_decodes < 2:
            return
        following = _following(inputs)
        try:
            sampled = self._forward(following, token_ids.clamp(min=0))  # a failed row's token is none
        except torch.AcceleratorError:
            raise
        except (
            Exception
        ):  # memory, or a sequence at fault: the step itself says so when its turn comes, or it fits then
            return
        self._guess = _Guess(following, sampled)

    def expect(self, token_ids: NDArray[np.int64]) -> None:
        """What the step before the guess sampled, now that it is read."""
        if self._guess is not None:
            self._guess.expected_ids = token_ids


def _is_plain_decode(inputs: BatchInputs) -> bool:
    """Whether its tokens depend on nothing that the host adds at every step."""
    rows = inputs.sampling
    has_extras = inputs.edits is not None or inputs.masks is not None or inputs.scored is not None
    return inputs.next_slots is not None and not has_extras and rows.logprob_rows is None


def _following(inputs: BatchInputs) -> BatchInputs:
    assert inputs.next_slots is not None
    return replace(
        inputs,
        position_ids=inputs.position_ids + 1,
        slot_mapping=inputs.next_slots,
        context_lens=inputs.context_lens + np.int32(1),
        sampled_positions=inputs.sampled_positions + 1,
        max_context_len=inputs.max_context_len + 1,
        next_slots=None,
    )


def _find_rows(guess: BatchInputs, inputs: BatchInputs) -> NDArray[np.int64] | None:
    """For each row of the inputs its row in the guess; None if one is not there."""
    slots, wanted = guess.sampling.slots, inputs.sampling.slots
    order = slots.argsort()
    places = np.searchsorted(slots, wanted, sorter=order)
    if (places >= len(slots)).any():
        return None
    rows: NDArray[np.int64] = order[places]
    return rows if np.array_equal(slots[rows], wanted) else None


def _is_same(guess: _Guess, inputs: BatchInputs, rows: NDArray[np.int64]) -> bool:
    """Whether these rows of the guess are the inputs', token for token and place for place."""
    assert guess.expected_ids is not None
    pairs = (
        (guess.inputs.sampling.sequence_ids, inputs.sampling.sequence_ids),
        (guess.inputs.position_ids, inputs.position_ids),
        (guess.inputs.slot_mapping, inputs.slot_mapping),
        (guess.expected_ids, inputs.input_ids),
    )
    return all(np.array_equal(guessed[rows], actual) for guessed, actual in pairs)
