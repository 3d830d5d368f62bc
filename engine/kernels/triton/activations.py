"""Gated activations of merged rows [gate | up]: silu(gate) · up, or gelu(gate) · up with the tanh approximation."""

import triton
import triton.language as tl

from engine.kernels.triton.early import await_inputs
from engine.kernels.triton.numerics import narrow, widen


@triton.jit
def glu_kernel(
    gate_up_ptr, out_ptr, SIZE: tl.constexpr, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """`BLOCK` values of one row; dense rows. The activation is rounded to its dtype before the product, as in torch."""
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < SIZE
    gate = widen(tl.load(gate_up_ptr + row * (2 * SIZE) + places, mask=mask, other=0.0))
    up = widen(tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + places, mask=mask, other=0.0))
    dtype = out_ptr.dtype.element_ty
    if IS_GELU:
        # 0.5·(1 + tanh(z)) = 1 / (1 + e^-2z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1 + tl.exp(-2 * z))
    else:
        active = gate / (1 + tl.exp(-gate))
    tl.store(out_ptr + row * SIZE + places, narrow(widen(narrow(active, dtype)) * up, dtype), mask=mask)
