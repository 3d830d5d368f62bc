"""Keys and values of a step into their pages."""

import triton
import triton.language as tl

from engine.kernels.triton.numerics import narrow, widen


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    slot_stride,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's keys and values, `SIZE` of each, to its slot; a negative slot is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    places = tl.arange(0, BLOCK)
    mask = places < SIZE
    heads = places // HEAD_DIM
    dims = places % HEAD_DIM
    k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=mask)
    dtype = k_cache_ptr.dtype.element_ty
    tl.store(k_cache_ptr + slot * slot_stride + places, narrow(widen(k), dtype), mask=mask)
    tl.store(v_cache_ptr + slot * slot_stride + places, narrow(widen(v), dtype), mask=mask)
