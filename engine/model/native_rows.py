"""Norms, rotary embedding, gated activations and rows of tables on a CPU through engine/kernels/rows.c.

The twins are transformers' own modules: `engine.model.fusion` holds every layer against them at load.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.build import build_library, load_library
from engine.kernels.native_function import FORMATS, Chain, NativeFunction
from engine.model.norm_rule import NormRule
from engine.model.quantised_rows import QuantisedRows, addresses_of
from engine.model.workspace import Workspace

DTYPES = (torch.float32, torch.bfloat16)
# As in rows.c: `norm_args`, `rope_args`, `glu_args`, `gather_args`.
_NORM = struct.Struct("@6P2q7if")
_ROPE = struct.Struct("@3P2q6i")
_GLU = struct.Struct("@5P5i4x")
_GATHER = struct.Struct("@3Pq4i")
_ROWS_OF_NORM = struct.calcsize("@6P2q")
_ROWS_OF_ROPE = struct.calcsize("@3P2q")
_ROWS_OF_GLU = struct.calcsize("@5P")
_ROWS_OF_GATHER = struct.calcsize("@3Pq")


class NativeRows:
    """Compiled when it is made. Raises `KernelBuildError` where that fails."""

    def __init__(self, kernels_dir: Path) -> None:
        path = build_library("rows", kernels_dir)
        library = load_library(path)
        self.build = path.stem
        self._norm = NativeFunction(library, "promptmill_norm", rows_at=_ROWS_OF_NORM)
        self._rope = NativeFunction(library, "promptmill_rope", rows_at=_ROWS_OF_ROPE)
        self._glu = NativeFunction(library, "promptmill_glu", rows_at=_ROWS_OF_GLU)
        self._gather = NativeFunction(library, "promptmill_gather", rows_at=_ROWS_OF_GATHER)
        self.chain = Chain(library)
        self.workspace = Workspace()

    def norm(self, x: Tensor, out: Tensor, weight: Tensor, rule: NormRule) -> None:
        """RMS norm of every `len(weight)` elements of x's rows into out, which may be x; both `[num_rows, size]`."""
        self._norm(_norm_arguments(x, out, weight, rule))

    def norm_link(self, x: Tensor, out: Tensor | QuantisedRows, weight: Tensor, rule: NormRule) -> bytes:
        """`norm` as a part of a chain."""
        return self._norm.link(_norm_arguments(x, out, weight, rule))

    def rope_link(self, x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int) -> bytes:
        """The call that rotates each head of x `[num_rows, num_heads * head_dim]` in place.

        cos, sin: `[num_rows, rotary_dim]`.
        """
        return self._rope.link(_rope_arguments(x, cos, sin, head_dim))

    def glu(self, gate_up: Tensor, *, is_gelu: bool) -> Tensor:
        """`activation(gate) * up` `[num_rows, size]` for gate_up `[num_rows, 2 * size]`: SiLU, or GELU with tanh."""
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        self._glu(_glu_arguments(gate_up, out, is_gelu))
        return out

    def glu_link(self, gate_up: Tensor, out: Tensor | QuantisedRows, *, is_gelu: bool) -> bytes:
        """`glu` into out as a part of a chain."""
        return self._glu.link(_glu_arguments(gate_up, out, is_gelu))

    def gather_link(self, table: Tensor, places: int, out: Tensor) -> bytes:
        """The call that writes rows of a table `[table_rows, size]` into out `[num_rows, size]`, both contiguous.

        places: where the address of int64 `[num_rows]` lies at the time of the call.
        """
        assert table.is_contiguous() and out.is_contiguous() and out.dtype in DTYPES, "dense rows"
        return self._gather.link(
            _GATHER.pack(
                table.data_ptr(),
                places,
                out.data_ptr(),
                len(table),
                len(out),
                out.shape[1],
                FORMATS[table.dtype],
                out.dtype == torch.bfloat16,
            )
        )


def _norm_arguments(x: Tensor, out: Tensor | QuantisedRows, weight: Tensor, rule: NormRule) -> bytes:
    size = weight.shape[0]
    assert x.stride(1) == 1 and x.shape[1] % size == 0, "rows of whole groups"
    if isinstance(out, Tensor):
        assert out.stride(1) == 1, "rows of whole groups"
        place, out_stride = out.data_ptr(), out.stride(0)
    else:
        assert x.shape[1] == size, "rows in 8 bits are one group"
        place = out_stride = 0
    return _NORM.pack(
        x.data_ptr(),
        weight.data_ptr(),
        place,
        *addresses_of(out),
        x.stride(0),
        out_stride,
        x.shape[0],
        x.shape[1] // size,
        size,
        rule.adds_one,
        rule.rounds_first,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        rule.epsilon,
    )


def _rope_arguments(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bytes:
    assert x.stride(1) == cos.stride(1) == sin.stride(1) == 1 and cos.stride(0) == sin.stride(0), "dense rows"
    assert x.dtype == cos.dtype == sin.dtype, "one dtype"
    return _ROPE.pack(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        x.stride(0),
        cos.stride(0),
        x.shape[0],
        x.shape[1] // head_dim,
        head_dim,
        cos.shape[1],
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def _glu_arguments(gate_up: Tensor, out: Tensor | QuantisedRows, is_gelu: bool) -> bytes:
    assert gate_up.is_contiguous() and (not isinstance(out, Tensor) or out.is_contiguous()), "contiguous rows"
    return _GLU.pack(
        gate_up.data_ptr(),
        out.data_ptr() if isinstance(out, Tensor) else 0,
        *addresses_of(out),
        gate_up.shape[0],
        gate_up.shape[1] // 2,
        is_gelu,
        gate_up.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
