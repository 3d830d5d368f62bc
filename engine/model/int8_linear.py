"""Linear layers in 8 bits on a CPU through engine/kernels/matmul_int8.c: quantises the weight once, passes pointers.

The weight is scaled per output channel, a row of activations when it comes; the kernel states both. Sums are exact
integers, so a row is the same to the bit in every batch, for any number of threads, on any instruction set.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.kernels.build import build_library, load_library
from engine.kernels.native_function import NativeFunction
from engine.model.chained_linear import ChainedLinear
from engine.model.quantised_rows import QuantisedRows, addresses_of, depth_of
from engine.model.workspace import Workspace

DTYPES = (torch.float32, torch.bfloat16)
MAX_IN_FEATURES = 65_536  # of 255 * 127 each a sum of 32 bits holds so many
_PANEL = 16  # LANES of lanes.h
# Every CPU must round alike, also those that fuse a multiplication with an addition.
_FLAGS = ("-ffp-contract=off",)
# `product_args` and `pack_args` of matmul_int8.c.
_PRODUCT = struct.Struct("@10P1q6i")
_ROWS_AT = struct.calcsize("@10P1q")
_PACK = struct.Struct("@4P4i")


class Int8Kernels:
    """Compiled when it is made. Raises `KernelBuildError` where that fails."""

    def __init__(self, kernels_dir: Path) -> None:
        path = build_library("matmul_int8", kernels_dir, flags=_FLAGS)
        library = load_library(path)
        self.build = path.stem
        self.matmul = NativeFunction(library, "promptmill_matmul_int8", rows_at=_ROWS_AT)
        self._pack = library.promptmill_pack_int8

    def pack(self, weight: Tensor) -> "PackedWeight":
        """Quantise a weight `[out_features, in_features]`. Raises `ModelLoadError` for one that cannot be."""
        out_features, in_features = weight.shape
        if in_features > MAX_IN_FEATURES or not bool(torch.isfinite(weight).all()):
            raise ModelLoadError(
                f"a weight of {out_features} x {in_features} cannot be quantised: it must be finite, with no more than "
                f"{MAX_IN_FEATURES} inputs; set quantize to none"
            )
        weight = weight.detach().contiguous()
        num_columns = -(-out_features // _PANEL) * _PANEL
        depth = depth_of(in_features)
        packed = PackedWeight(
            codes=torch.zeros(num_columns * depth, dtype=torch.int8),
            scales=torch.zeros(num_columns),
            totals=torch.zeros(num_columns, dtype=torch.int32),
        )
        self._pack(
            _PACK.pack(
                weight.data_ptr(),
                packed.codes.data_ptr(),
                packed.scales.data_ptr(),
                packed.totals.data_ptr(),
                in_features,
                out_features,
                weight.dtype == torch.bfloat16,
                torch.get_num_threads(),
            )
        )
        return packed


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """As the kernel reads it: codes in panels, and of every column its scale and the sum of its codes."""

    codes: Tensor  # int8 [num_panels * depth * _PANEL]
    scales: Tensor  # float32 [num_panels * _PANEL]
    totals: Tensor  # int32 [num_panels * _PANEL]


class Int8Linear(ChainedLinear):
    """`x @ weight.T + bias` in 8 bits; x and the result are float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Int8Kernels) -> None:
        super().__init__(weight, kernels.matmul)
        self._weight = kernels.pack(weight)
        self._bias = None if bias is None else bias.detach().float().contiguous()

    @property
    def num_bytes(self) -> int:
        """See `ChainedLinear.num_bytes`."""
        return self._weight.codes.nbytes

    def input_rows(
        self, workspace: Workspace, name: str, num_rows: int, dtype: torch.dtype, first: int = 0
    ) -> Tensor | QuantisedRows:
        """See `ChainedLinear.input_rows`."""
        return QuantisedRows.within(workspace, name, num_rows, self.in_features, first)

    def _arguments(self, x: Tensor | QuantisedRows, out: Tensor, addend: Tensor | None) -> bytes:
        dtype = x.dtype if isinstance(x, Tensor) else out.dtype
        assert dtype in DTYPES, "an Int8Linear takes float32 or bfloat16"
        weight = self._weight
        return _PRODUCT.pack(
            x.data_ptr() if isinstance(x, Tensor) else 0,
            *addresses_of(x),
            weight.codes.data_ptr(),
            weight.scales.data_ptr(),
            weight.totals.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            0 if addend is None else addend.data_ptr(),
            out.data_ptr(),
            x.stride(0) if isinstance(x, Tensor) else 0,
            out.shape[0],
            self.in_features,
            self.out_features,
            dtype == torch.bfloat16,
            torch.get_num_threads(),
            out.dtype != dtype,
        )
