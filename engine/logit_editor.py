"""Changes rows of logits as requests ask, in place and sparsely: nothing here reads a whole row of the vocabulary.

The order is that of transformers and vLLM. Biases are added; then, for the tokens that stand in the sequence, the
repetition penalty divides a positive logit and multiplies a negative one (Keskar et al., 2019), the frequency penalty
is taken once for each time that the output holds the token, and the presence penalty once; then ends that come too
early are ruled out. A row's result does not depend on what else is edited.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class LogitEditor:
    """Tensors on the logits' device, from `engine.runner.logit_edits`. A list that nobody asks for is empty."""

    bias_rows: Tensor  # int64 [num_biases]
    bias_ids: Tensor
    biases: Tensor  # float32
    penalized_rows: Tensor  # int64 [num_penalized]
    repetition: Tensor  # float32 [num_penalized]
    frequency: Tensor
    presence: Tensor
    owners: Tensor  # int64 [num_entries], places among the penalized rows
    token_ids: Tensor  # int64 [num_entries]
    counts: Tensor  # float32 [num_entries]
    end_rows: Tensor  # int64 [num_ends]
    end_ids: Tensor

    def apply(self, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mutates logits, float32 `[num_rows, vocab_size]`, contiguous; what is returned undoes it."""
        saved = []
        if len(self.biases):
            places, before = _look_up(logits, self.bias_rows, self.bias_ids)
            _write(logits, places, before + self.biases)
            saved.append((places, before))
        if len(self.owners):
            saved.append(self._penalize(logits))
        if len(self.end_rows):
            places, before = _look_up(logits, self.end_rows, self.end_ids)
            _write(logits, places, torch.full_like(before, float("-inf")))
            saved.append((places, before))
        return saved

    def _penalize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mutates logits; returns where it did, and what was there."""
        places, before = _look_up(logits, self.penalized_rows.index_select(0, self.owners), self.token_ids)
        _write(logits, places, self._penalized(before))
        return places, before

    def _penalized(self, logits: Tensor) -> Tensor:
        repetition = self.repetition.index_select(0, self.owners)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - self.frequency.index_select(0, self.owners) * self.counts
        return logits - self.presence.index_select(0, self.owners) * (self.counts > 0)


def undo(logits: Tensor, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Give the edited logits back what they were. Mutates logits."""
    for places, values in reversed(saved):
        _write(logits, places, values)


# Flat gather and scatter: on a CPU an eighth of what indexing with rows and columns takes.


def _look_up(logits: Tensor, rows: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the logits lie in the flat tensor, and what they are."""
    places = rows * logits.shape[1] + token_ids
    return places, logits.view(-1).gather(0, places)


def _write(logits: Tensor, places: Tensor, values: Tensor) -> None:
    logits.view(-1).scatter_(0, places, values)
