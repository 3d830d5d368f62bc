"""What our own linear layers on a CPU have in common: a compiled product that takes pointers, alone or in a chain."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from engine.kernels.native_function import NativeFunction
from engine.model.quantised_rows import QuantisedRows
from engine.model.workspace import Workspace


class ChainedLinear(nn.Module):
    """`x @ weight.T + bias` for a packed weight `[out_features, in_features]`; x and the result are of one dtype."""

    def __init__(self, weight: Tensor, matmul: NativeFunction) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in_features]`; returns `[..., out_features]`."""
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        output = torch.empty((rows.shape[0], self.out_features), dtype=x.dtype)
        self._matmul(self._arguments(rows, output, None))
        return output if rows is x else output.view(*x.shape[:-1], self.out_features)

    def input_rows(
        self, workspace: Workspace, name: str, num_rows: int, dtype: torch.dtype, first: int = 0
    ) -> Tensor | QuantisedRows:
        """What `link` is given at best, in the workspace from row `first` on: the numbers that the call before makes in
        `dtype`."""
        return workspace.rows(name, num_rows, self.in_features, dtype, first)

    def link(self, x: Tensor | QuantisedRows, out: Tensor, addend: Tensor | None = None) -> bytes:
        """The call that writes the product of rows x, plus addend, into out; out and addend are contiguous, or one.

        out: of the dtype that the product computes in, or the same numbers as float32.
        """
        return self._matmul.link(self._arguments(x, out, addend))

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of the weight, as each pass over it reads them."""

    @abstractmethod
    def _arguments(self, x: Tensor | QuantisedRows, out: Tensor, addend: Tensor | None) -> bytes:
        """Of `link`'s call, as the product reads them."""
