"""Tensors between a CPU model's native calls that keep their place from step to step, and what is made of their places.

So a call is put together once for a number of rows, not in every step. Belongs to one model, which computes one step at
a time. Knows nothing of what the rows are.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

_Angles: TypeAlias = tuple[Tensor, Tensor]  # cos and sin

_MIN_ROWS = 64


class Workspace:
    """Grows to the largest step and stays."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._tensors: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._angles: tuple[_Angles, _Angles] | None = None  # as given last, and at their place
        self.prepared: dict[Any, Any] = {}

    @property
    def num_rows(self) -> int:
        """That there is room for."""
        return self._num_rows

    def reserve(self, num_rows: int, spare_rows: int = 0) -> None:
        """Make room for so many rows. Forgets everything where that moves the tensors.

        spare_rows: beside those, for as many parts of the rows that get equal room.
        """
        if num_rows + spare_rows > self._num_rows:
            self._num_rows = max(_MIN_ROWS, 1 << (num_rows - 1).bit_length()) + spare_rows
            self._tensors.clear()
            self.prepared.clear()
            self._angles = None

    def rows(self, name: str, num_rows: int, size: int, dtype: torch.dtype, first: int = 0) -> Tensor:
        """`[num_rows, size]`, at the same place in every call with these arguments; the rows from `first` on, no more
        than are reserved.

        Zeros to begin with: a padding row that nobody writes is no nan.
        """
        key = name, size, dtype
        if key not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[key] = torch.zeros((self._num_rows, size), dtype=dtype)
        return self._tensors[key][first : first + num_rows]

    def take_angles(self, given: _Angles) -> _Angles:
        """A step's cos and sin `[1, T, rotary_dim]` at their place; copied where they are others than before."""
        if self._angles is None or given is not self._angles[0]:
            num_rows, size = given[0].shape[1:]
            cos, sin = (self.rows(name, num_rows, size, given[0].dtype)[None] for name in ("cos", "sin"))
            cos.copy_(given[0])
            sin.copy_(given[1])
            self._angles = given, (cos, sin)
        return self._angles[1]
