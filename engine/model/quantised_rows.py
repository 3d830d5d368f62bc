"""Rows on their way into a product in 8 bits, quantised by the call before it: engine/kernels/quantise.h."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.model.workspace import Workspace

_DEPTH = 8  # DEPTH of dot_int8.h


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """Takes the place of `[num_rows, size]` between two calls of a chain."""

    codes: Tensor  # uint8 [num_rows, depth]
    scales: Tensor  # float32 [num_rows, 1]
    zeros: Tensor  # int32 [num_rows, 1]

    @classmethod
    def within(cls, workspace: Workspace, name: str, num_rows: int, size: int, first: int = 0) -> Self:
        """At the same place in every call with these arguments; the rows from `first` on, no more than are reserved."""
        return cls(
            codes=workspace.rows(f"{name} codes", num_rows, depth_of(size), torch.uint8, first),
            scales=workspace.rows(f"{name} scales", num_rows, 1, torch.float32, first),
            zeros=workspace.rows(f"{name} zeros", num_rows, 1, torch.int32, first),
        )

    def addresses(self) -> tuple[int, int, int]:
        """As the kernels read them."""
        return self.codes.data_ptr(), self.scales.data_ptr(), self.zeros.data_ptr()


def depth_of(size: int) -> int:
    """Codes of a row of so many numbers."""
    return -(-size // _DEPTH) * _DEPTH


def addresses_of(rows: Tensor | QuantisedRows) -> tuple[int, int, int]:
    """Zeros for rows that are no codes."""
    return rows.addresses() if isinstance(rows, QuantisedRows) else (0, 0, 0)
