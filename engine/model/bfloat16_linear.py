"""Linear layers in bfloat16 on a CPU that multiplies pairs of it, through engine/kernels/matmul_bf16.c.

The twin is `torch.nn.functional.linear`. A row is the same to the bit in every batch, for any number of threads.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.kernels.cpu_features import cpu_flags
from engine.kernels.native_function import NativeFunction
from engine.model import native_linear
from engine.model.native_linear import NativeLinear


def is_best_here() -> bool:
    """Whether the CPU has the instruction, and none that multiply whole tiles, which are oneDNN's."""
    return "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()


def load_matmul(kernels_dir: Path) -> tuple[str, NativeFunction]:
    """See `native_linear.load_matmul`."""
    return native_linear.load_matmul(kernels_dir, "matmul_bf16")


class Bfloat16Linear(NativeLinear):
    """The same for `weight` bfloat16."""

    dtype = torch.bfloat16

    def _columns(self, weight: Tensor) -> Tensor:
        """Two inputs as one number of 32 bits; a missing one is a zero."""
        if weight.shape[1] % 2 == 1:
            weight = nn.functional.pad(weight, (0, 1))
        return weight.contiguous().view(torch.int32)

    def _format(self, out: Tensor) -> int:
        """Whether the numbers that come out are written as float32."""
        return int(out.dtype == torch.float32)
