"""RMS norms, alone and behind the addition of a residual (Zhang and Sennrich, 2019):

    out = x · rsqrt(mean(x²) + epsilon) · weight

`ADDS_ONE` takes weight + 1 (Gemma); `ROUNDS_FIRST` rounds the normed row to its dtype before the weight (Llama). One
program a row, so that a row's sum does not depend on its batch.
"""

import triton
import triton.language as tl

from engine.kernels.triton.early import await_inputs
from engine.kernels.triton.numerics import narrow, widen


@triton.jit
def normed(x, scale, weight, dtype: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
    """x · scale · weight in `dtype`; x, scale and weight float32, of shapes that broadcast."""
    if ADDS_ONE:
        weight = weight + 1
    y = x * scale
    if ROUNDS_FIRST:
        y = widen(narrow(y, dtype))
    return narrow(y * weight, dtype)


@triton.jit
def norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    epsilon,
    SIZE: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One group of `SIZE` in one row; out may be x."""
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    mask = places < SIZE
    shift = tl.program_id(1) * SIZE
    x = widen(tl.load(x_ptr + row * x_stride + shift + places, mask=mask, other=0.0))
    weight = widen(tl.load(weight_ptr + places, mask=mask, other=0.0))
    scale = 1 / tl.sqrt_rn(tl.sum(x * x, 0) / SIZE + epsilon)
    out = normed(x, scale, weight, out_ptr.dtype.element_ty, ADDS_ONE, ROUNDS_FIRST)
    tl.store(out_ptr + row * out_stride + shift + places, out, mask=mask)


@triton.jit
def add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    epsilon,
    SIZE: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row: sum = residual + x in their dtype, out = its norm. All rows are dense."""
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64) * SIZE
    places = tl.arange(0, BLOCK)
    mask = places < SIZE
    x = widen(tl.load(x_ptr + row + places, mask=mask, other=0.0))
    residual = widen(tl.load(residual_ptr + row + places, mask=mask, other=0.0))
    weight = widen(tl.load(weight_ptr + places, mask=mask, other=0.0))  # on its way with the others
    dtype = sum_ptr.dtype.element_ty
    total = narrow(residual + x, dtype)
    tl.store(sum_ptr + row + places, total, mask=mask)
    total = widen(total)
    scale = 1 / tl.sqrt_rn(tl.sum(total * total, 0) / SIZE + epsilon)
    tl.store(out_ptr + row + places, normed(total, scale, weight, dtype, ADDS_ONE, ROUNDS_FIRST), mask=mask)
