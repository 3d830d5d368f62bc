"""The model's own distribution in some rows of logits: its log-softmax, at the tokens somebody asks for."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowLogprobs:
    """Made before anything changes the logits, and read when the rows' tokens are known."""

    rows: Tensor  # int64 [num_wanted]
    top_ids: Tensor  # int64 [num_wanted, num_top], the likeliest first, equal ones by id
    normalizers: Tensor  # float64 [num_wanted], the log of the sum of e^logit over the vocabulary

    def of(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the rows' tokens, the likeliest tokens, and their log-probabilities.

        logits: float32 `[num_rows, vocab_size]`, as they were; token_ids: int64 `[num_wanted]`. Returns float32
        `[num_wanted]`, and int64 and float32 `[num_wanted, num_top]`. A token among the likeliest has one value.
        """
        wanted = torch.cat((token_ids[:, None], self.top_ids), dim=1)
        logprobs = (logits[self.rows[:, None], wanted].double() - self.normalizers[:, None]).float()
        return logprobs[:, 0], self.top_ids, logprobs[:, 1:]
