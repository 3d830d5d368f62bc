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

    def apply(self, logits: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Mutates logits, float32 `[num_rows, vocab_size]`; what is returned undoes it."""
        saved = []
        if len(self.biases):
            saved.append(_save(logits, self.bias_rows, self.bias_ids))
            logits[self.bias_rows, self.bias_ids] = saved[-1][2] + self.biases
        if len(self.owners):
            saved.append(_save(logits, self.penalized_rows[self.owners], self.token_ids))
            logits[saved[-1][0], self.token_ids] = self._penalize(saved[-1][2])
        if len(self.end_rows):
            saved.append(_save(logits, self.end_rows, self.end_ids))
            logits[self.end_rows, self.end_ids] = float("-inf")
        return saved

    def _penalize(self, logits: Tensor) -> Tensor:
        repetition, counts = self.repetition[self.owners], self.counts
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - self.frequency[self.owners] * counts
        return logits - self.presence[self.owners] * (counts > 0)


def undo(logits: Tensor, saved: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give the edited logits back what they were. Mutates logits."""
    for rows, token_ids, values in reversed(saved):
        logits[rows, token_ids] = values


def _save(logits: Tensor, rows: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows, token_ids, logits[rows, token_ids]
