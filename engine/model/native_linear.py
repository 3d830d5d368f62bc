"""Linear layers in float32 on a CPU through engine/kernels/matmul.c: packs the weight once, passes pointers.

A weight whose numbers are all bfloat16's, as in most checkpoints, or float16's, is kept so: the same bits come out, and
half of the bytes are read. The twin is `torch.nn.functional.linear`. A row is the same to the bit in every batch, for
any number of threads.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.build import build_library, load_library
from engine.kernels.native_function import FORMATS, NativeFunction
from engine.model.chained_linear import ChainedLinear
from engine.model.narrow_weights import narrowed
from engine.model.quantised_rows import QuantisedRows

_PANEL = 16  # LANES of lanes.h
# `product_args` of matmul.c and matmul_bf16.c: five pointers, one 64-bit and five 32-bit integers, padded to 8 bytes.
_ARGUMENTS = struct.Struct("@5P1q5i4x")
_ROWS_AT = struct.calcsize("@5P1q")


def load_matmul(kernels_dir: Path, name: str = "matmul") -> tuple[str, NativeFunction]:
    """The name of the build, and the compiled product. Raises `KernelBuildError` where it cannot be compiled."""
    path = build_library(name, kernels_dir)
    return path.stem, NativeFunction(load_library(path), f"promptmill_{name}", rows_at=_ROWS_AT)


class NativeLinear(ChainedLinear):
    """`x @ weight.T + bias` for `weight` float32 `[out_features, in_features]`; keeps no copy of the plain weight."""

    dtype = torch.float32  # of rows; computed in

    def __init__(self, weight: Tensor, bias: Tensor | None, matmul: NativeFunction) -> None:
        super().__init__(weight, matmul)
        self._panels = pack_panels(self._columns(weight.detach()))
        self._bias = None if bias is None else bias.detach().float().contiguous()

    @property
    def num_bytes(self) -> int:
        """See `ChainedLinear.num_bytes`."""
        return self._panels.nbytes

    def _columns(self, weight: Tensor) -> Tensor:
        """As the panels hold them."""
        return narrowed(weight)

    def _format(self, out: Tensor) -> int:
        """The product's last argument."""
        return FORMATS[self._panels.dtype]

    def _arguments(self, x: Tensor | QuantisedRows, out: Tensor, addend: Tensor | None) -> bytes:
        assert isinstance(x, Tensor) and x.dtype == self.dtype, f"a {type(self).__name__} computes in {self.dtype}"
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
            self._format(out),
        )


def pack_panels(weight: Tensor) -> Tensor:
    """`[num_panels, in_features, _PANEL]` of a weight `[out_features, in_features]`; missing columns are zeros."""
    out_features, in_features = weight.shape
    num_panels = -(-out_features // _PANEL)
    panels = weight.new_zeros((num_panels, in_features, _PANEL))
    num_whole = out_features // _PANEL
    panels[:num_whole] = weight[: num_whole * _PANEL].view(num_whole, _PANEL, in_features).transpose(1, 2)
    if num_whole < num_panels:
        panels[num_whole, :, : out_features - num_whole * _PANEL] = weight[num_whole * _PANEL :].t()
    return panels
