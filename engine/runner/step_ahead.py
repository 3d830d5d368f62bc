"""Computes a step of decodes before the one before it is read, so that the device never waits for the host.

While the host reads step N, books its tokens and plans step N + 1, the device computes step N + 1 already, from the
tokens that lie on it. That is a guess at the plan: the same sequences, each one token on. The plan that comes takes
from it what was guessed right, row by row, since a row does not depend on the others: prompts that came meanwhile are
then computed in a step of their own, which costs a device no more than in one with the decodes, unless they are short.
Likewise what lies behind a decode that was not guessed. A guess writes keys and values only where its sequences' next
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


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """The tokens of a step's decodes, int64 on the device, and what of the step is left to compute."""

    token_ids: Tensor
    rest: BatchInputs | None


class StepAhead:
    """At most one step of decodes that is computed but not asked for yet."""

    def __init__(self, forward: Forward, to_device: HostToDevice) -> None:
        """`forward`: launches a step with these input tokens and returns what it samples, both int64 on the device."""
        self._forward = forward
        self._to_device = to_device
        self._guess: _Guess | None = None

    def take(self, inputs: BatchInputs) -> "Taken | None":
        """What of a step is computed already; None if nothing is."""
        guess, self._guess = self._guess, None
        num_decodes = _num_plain_decodes(inputs)
        if guess is None or guess.expected_ids is None or not num_decodes:
            return None
        rows = _right_rows(guess, inputs, num_decodes)
        if not len(rows):
            return None
        rest = inputs.behind(len(rows)) if inputs.num_seqs > len(rows) else None
        if np.array_equal(rows, np.arange(guess.inputs.num_seqs)):
            return Taken(guess.token_ids, rest)
        return Taken(guess.token_ids[self._to_device.send(rows)[0]], rest)

    def launch(self, inputs: BatchInputs, token_ids: Tensor) -> None:
        """Compute the step after `inputs`, which samples `token_ids`, if that is a step of decodes."""
        if inputs.next_slots is None or not _num_plain_decodes(inputs):
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


def _num_plain_decodes(inputs: BatchInputs) -> int:
    """The step's leading decodes, if all its tokens depend on nothing that the host adds at every step; else 0."""
    has_extras = inputs.edits is not None or inputs.masks is not None or inputs.scored is not None
    if has_extras or inputs.sampling.logprob_rows is not None:
        return 0
    num_decodes = inputs.num_decodes
    is_sampled = np.array_equal(inputs.logits_indices[:num_decodes], np.arange(num_decodes))
    return num_decodes if is_sampled else 0


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


def _right_rows(guess: _Guess, inputs: BatchInputs, num_decodes: int) -> NDArray[np.int64]:
    """The guess's rows of the inputs' first decodes, up to one that it lacks or has with another token or place."""
    assert guess.expected_ids is not None
    slots, wanted = guess.inputs.sampling.slots, inputs.sampling.slots[:num_decodes]
    order = slots.argsort()
    places = np.searchsorted(slots, wanted, sorter=order)
    rows: NDArray[np.int64] = order[np.minimum(places, len(slots) - 1)]
    pairs = (
        (slots, wanted),
        (guess.inputs.sampling.sequence_ids, inputs.sampling.sequence_ids),
        (guess.inputs.position_ids, inputs.position_ids),
        (guess.inputs.slot_mapping, inputs.slot_mapping),
        (guess.expected_ids, inputs.input_ids),
    )
    is_right = np.logical_and.reduce([guessed[rows] == actual[:num_decodes] for guessed, actual in pairs])
    return rows if is_right.all() else rows[: is_right.argmin()]
