"""Arithmetic that every Triton kernel shares: exact widening, rounding to nearest even, matrix products.

Compiled, each is a single instruction. Triton's interpreter keeps a bfloat16 as its 16 bits: it multiplies those as
integers in a product and cuts them off where the device rounds; and it leaves products to a library that adds up in an
order which depends on a row's place. So under the interpreter all of this is written out here, and a kernel computes
there what it computes on a device, but for the order of additions within one product.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """x as float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x, float32, in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # a NaN stays one
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, total):
    """a @ b + total in float32; a and b of one dtype, float32 not cut to TF32."""
    if INTERPRETED:
        return total + tl.sum(widen(a)[:, :, None] * widen(b)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")
