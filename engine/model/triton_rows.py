"""Norms, rotary embedding and gated activations on a GPU through engine/kernels/triton: checks shapes and launches.

The twins are transformers' own modules: `engine.model.fusion` holds every layer against them at load.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from engine.attention.base import PageSlots
from engine.kernels.triton.activations import glu_kernel
from engine.kernels.triton.early import early_launch
from engine.kernels.triton.norms import add_norm_kernel, norm_kernel
from engine.kernels.triton.qkv import qkv_kernel
from engine.model.norm_rule import NormRule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GLU_BLOCK = 1024
_HEADS_A_PROGRAM = 8


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of queries' and keys' heads; weights `[head_dim]`."""

    q_weight: Tensor
    k_weight: Tensor
    rule: NormRule


class TritonRows:
    """Has the functions of `engine.model.native_rows.NativeRows` that a GPU needs, and those that fuse more."""

    build = f"triton {triton.__version__} rows"

    def norm(self, x: Tensor, out: Tensor, weight: Tensor, rule: NormRule) -> None:
        """RMS norm of every `len(weight)` elements of x's rows into out, which may be x; both `[num_rows, size]`."""
        size = len(weight)
        assert x.stride(1) == out.stride(1) == 1 and x.shape[1] % size == 0, "rows of whole groups"
        block = triton.next_power_of_2(size)
        norm_kernel[(len(x), x.shape[1] // size)](
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            rule.epsilon,
            SIZE=size,
            ADDS_ONE=rule.adds_one,
            ROUNDS_FIRST=rule.rounds_first,
            BLOCK=block,
            num_warps=_num_warps(block),
            **early_launch(x),
        )

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
        """residual + x and its RMS norm; all `[num_rows, size]`."""
        assert x.is_contiguous() and residual.is_contiguous() and x.shape == residual.shape, "dense rows of one shape"
        size = x.shape[1]
        assert weight.shape == (size,), "a weight for each column"
        total, out = torch.empty_like(x), torch.empty_like(x)
        block = triton.next_power_of_2(size)
        add_norm_kernel[(len(x),)](
            x,
            residual,
            weight,
            total,
            out,
            rule.epsilon,
            SIZE=size,
            ADDS_ONE=rule.adds_one,
            ROUNDS_FIRST=rule.rounds_first,
            BLOCK=block,
            num_warps=_num_warps(block),
            **early_launch(x),
        )
        return total, out

    def rotate_and_write(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        norms: HeadNorms | None,
        pages: PageSlots,
        *,
        num_heads: int,
    ) -> Tensor:
        """Queries `[num_rows, num_heads, head_dim]` of merged rows; keys and values go to their slots.

        qkv: `[num_rows, (num_heads + 2 * num_kv_heads) * head_dim]`; angles: cos and sin `[num_rows, rotary_dim]`.
        """
        num_kv_heads, head_dim = pages.keys.shape[-2:]
        assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and qkv.stride(1) == 1, "rows of q, k, v"
        assert len(pages.slots) <= len(qkv), "a row for each slot"
        q = qkv.new_empty((len(qkv), num_heads, head_dim))
        cos, sin = angles if angles is not None else (None, None)
        if cos is not None and sin is not None:
            assert cos.stride() == sin.stride() and cos.stride(1) == 1 and len(cos) == len(qkv), "angles of each row"
        qkv_kernel[(len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS_A_PROGRAM))](
            qkv,
            cos,
            sin,
            norms.q_weight if norms is not None else None,
            norms.k_weight if norms is not None else None,
            q,
            pages.keys,
            pages.values,
            pages.slots,
            len(pages.slots),
            qkv.stride(0),
            0 if cos is None else cos.stride(0),
            pages.keys.stride(-3),
            norms.rule.epsilon if norms is not None else 0.0,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTARY=0 if cos is None else cos.shape[1],
            ADDS_ONE=norms is not None and norms.rule.adds_one,
            ROUNDS_FIRST=norms is not None and norms.rule.rounds_first,
            BLOCK_H=_HEADS_A_PROGRAM,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
            **early_launch(qkv),
        )
        return q

    def glu(self, gate_up: Tensor, *, is_gelu: bool) -> Tensor:
        """`activation(gate) * up` `[num_rows, size]` for gate_up `[num_rows, 2 * size]`: SiLU, or GELU with tanh."""
        assert gate_up.is_contiguous(), "gate_up is contiguous"
        num_rows, width = gate_up.shape
        out = gate_up.new_empty((num_rows, width // 2))
        glu_kernel[(num_rows, triton.cdiv(width // 2, _GLU_BLOCK))](
            gate_up, out, SIZE=width // 2, IS_GELU=is_gelu, BLOCK=_GLU_BLOCK, num_warps=4, **early_launch(out)
        )
        return out


def _num_warps(block: int) -> int:
    """About eight values a thread."""
    return min(max(block // 256, 1), 16)
