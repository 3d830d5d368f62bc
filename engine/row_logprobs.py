"""The model's own distribution in some rows of logits: its log-softmax, at the tokens somebody asks for."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowLogprobs:
    """Made before anything changes the logits; read when the rows' tokens are known."""

    rows: Tensor  # int64 [num_wanted]
    top_ids: Tensor  # int64 [num_wanted, num_top], the likeliest first, equal ones by id
    top_logprobs: Tensor  # float32 [num_wanted, num_top]
    normalizers: Tensor  # float64 [num_wanted], the log of the sum of e^logit over the vocabulary

    def of(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probabilities float32 `[num_wanted]` of the rows' tokens, int64 like them.

        logits: float32 `[num_rows, vocab_size]`, at these tokens as they were.
        """
        return normalized(logits, self.rows[:, None], token_ids[:, None], self.normalizers)[:, 0]


def normalized(logits: Tensor, rows: Tensor, token_ids: Tensor, normalizers: Tensor) -> Tensor:
    """float32 like token_ids, `[num_wanted, num_tokens]`: an exact difference, rounded once."""
    return (logits[rows, token_ids].double() - normalizers[:, None]).float()
