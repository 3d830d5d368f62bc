"""The output layer behind a fork: of the rows that reach it the first become logits, the others stay hidden states.

So the rows of both kinds are asked for in one place, the model's `logits_to_keep`. Knows nothing of whose they are.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

MIN_ROWS = 2  # matrix libraries take another path, with other bits, for a single row


class OutputRows(nn.Module):
    """In the place of a model's output layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.num_logits: int | None = None  # of the next forward's rows; None: all
        self.target: Tensor | None = None  # where the next forward's logits go, if that saves copying them
        self._hidden_states: Tensor | None = None

    @classmethod
    def put_into(cls, model: Any) -> Self:
        """In front of the output layer of a model of transformers."""
        output_rows = cls(model.get_output_embeddings())
        model.set_output_embeddings(output_rows)
        return output_rows

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, num_rows, hidden_size]`. Returns logits `[1, num_logits, vocab_size]`, and perhaps some more rows."""
        if self.num_logits is not None:
            self._hidden_states = x[0, self.num_logits :]
            if not self.num_logits:
                return x.new_zeros((1, 0, 1))
            x = x[:, : max(self.num_logits, MIN_ROWS)]
        target, self.target = self.target, None
        layer = self.layer
        if target is not None and type(layer) is nn.Linear and layer.bias is None and len(target) == x.shape[1]:
            return torch.mm(x[0], layer.weight.t(), out=target)[None]
        logits: Tensor = layer(x)
        return logits

    def take_hidden_states(self) -> Tensor:
        """`[num_rows - num_logits, hidden_size]`, of the last forward."""
        assert self._hidden_states is not None, "a forward comes before its hidden states"
        hidden_states, self._hidden_states = self._hidden_states, None
        return hidden_states
