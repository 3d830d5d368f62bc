"""Linear layers in bfloat16 on a CPU that multiplies pairs of it, through engine/kernels/matmul_bf16.c: packs the
weight once, passes pointers.

The twin is `torch.nn.functional.linear`. A row is the same to the bit in every batch, for any number of threads.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.kernels.build import build_library, load_library
from engine.kernels.cpu_features import cpu_flags
from engine.kernels.native_function import NativeFunction
from engine.model.chained_linear import ChainedLinear
from engine.model.native_linear import pack_panels
from engine.model.quantised_rows import QuantisedRows

# `product_args` of matmul_bf16.c: five pointers, one 64-bit and five 32-bit integers, padded to 8 bytes.
_ARGUMENTS = struct.Struct("@5P1q5i4x")
_ROWS_AT = struct.calcsize("@5P1q")


def is_best_here() -> bool:
    """Whether the CPU has the instruction, and none that multiply whole tiles, which are oneDNN's."""
    return "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()


def load_matmul(kernels_dir: Path) -> tuple[str, NativeFunction]:
    """The name of the build, and the compiled product. Raises `KernelBuildError` where it cannot be compiled."""
    path = build_library("matmul_bf16", kernels_dir)
    return path.stem, NativeFunction(load_library(path), "promptmill_matmul_bf16", rows_at=_ROWS_AT)


class Bfloat16Linear(ChainedLinear):
    """`x @ weight.T + bias` for `weight` bfloat16 `[out_features, in_features]`; keeps no copy of the plain weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, matmul: NativeFunction) -> None:
        super().__init__(weight, matmul)
        self._panels = pack_panels(_pairs(weight.detach()))
        self._bias = None if bias is None else bias.detach().float().contiguous()

    @property
    def num_bytes(self) -> int:
        """See `ChainedLinear.num_bytes`."""
        return self._panels.nbytes

    def _arguments(self, x: Tensor | QuantisedRows, out: Tensor, addend: Tensor | None) -> bytes:
        assert isinstance(x, Tensor) and x.dtype == torch.bfloat16, "a Bfloat16Linear computes in bfloat16"
        return _ARGUMENTS.pack(
            x.data_ptr(),
            self._panels.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            0 if addend is None else addend.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            x.shape[0],
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
            out.dtype == torch.float32,
        )


def _pairs(weight: Tensor) -> Tensor:
    """Two inputs of a weight `[out_features, in_features]` as one number of 32 bits; a missing one is a zero."""
    if weight.shape[1] % 2 == 1:
        weight = nn.functional.pad(weight, (0, 1))
    return weight.contiguous().view(torch.int32)
