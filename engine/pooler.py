"""Gathers the hidden states of one sequence into the one vector that stands for its prompt. Numpy alone.

The mean is summed one token after the other, in float64, so that it is the same however the prompt was cut into chunks.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

PoolingMode = Literal["last", "mean"]
"""`last`: the last token's hidden state; `mean`: that of all tokens."""


class Pooler:
    """Of one sequence; what it has taken stays with it through preemption."""

    __slots__ = ("_num_left_out", "_num_tokens", "_sum", "num_passed")

    def __init__(self, mode: PoolingMode, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_left_out = num_tokens - 1 if mode == "last" else 0
        self.num_passed = self._num_left_out  # leading tokens whose hidden states are not wanted, or taken
        self._sum: NDArray[np.float64] | None = None

    def add(self, hidden_states: NDArray[np.float32]) -> None:
        """Those of the next tokens, `[num_tokens, hidden_size]`."""
        rows = hidden_states.astype(np.float64)
        if self._sum is not None:
            rows = np.concatenate((self._sum[None], rows))
        self._sum = np.add.reduce(rows, axis=0)  # row by row
        self.num_passed += len(hidden_states)

    def vector(self) -> NDArray[np.float32]:
        """`[hidden_size]`, once all are taken."""
        assert self._sum is not None and self.num_passed == self._num_tokens, "hidden states are missing"
        return (self._sum / (self._num_tokens - self._num_left_out)).astype(np.float32)
