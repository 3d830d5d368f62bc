"""Tensors between a CPU model's native calls that keep their place from step to step, and what is made of their places.

So a call is put together once for a number of rows, not in every step. Belongs to one model, which computes one step at
a time. Knows nothing of what the rows are.
"""

from typing import Any

import torch
from torch import Tensor

_MIN_ROWS = 64
_MAX_PREPARED = 4096  # steps of prompts have many sizes: then what was prepared is dropped and made again


class Workspace:
    """Grows to the largest step and stays."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._tensors: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._angles: tuple[Tensor, Tensor] | None = None
        self.prepared: dict[Any, Any] = {}

    def reserve(self, num_rows: int) -> None:
        """Make room for so many rows. Forgets everything where that moves the tensors."""
        if num_rows > self._num_rows:
            self._num_rows = max(_MIN_ROWS, 1 << (num_rows - 1).bit_length())
            self._tensors.clear()
            self.prepared.clear()
            self._angles = None
        if len(self.prepared) > _MAX_PREPARED:
            self.prepared.clear()

    def rows(self, name: str, num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """`[num_rows, size]`, at the same place in every call with these arguments; num_rows: no more than reserved."""
        key = name, size, dtype
        if key not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[key] = torch.empty((self._num_rows, size), dtype=dtype)
        return self._tensors[key][:num_rows]

    def take_angles(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A step's cos and sin `[1, T, rotary_dim]` at their place; copied where they are others than before."""
        num_rows, size = given[0].shape[1:]
        cos, sin = (self.rows(name, num_rows, size, given[0].dtype)[None] for name in ("cos", "sin"))
        if given is not self._angles:
            cos.copy_(given[0])
            sin.copy_(given[1])
            self._angles = given
        return cos, sin
