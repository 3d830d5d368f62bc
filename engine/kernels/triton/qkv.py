"""From a merged product's rows [q | k | v] to rotated queries, and keys and values in their pages.

Per head: the optional RMS norm of queries and keys, then the rotary embedding (Su et al., 2021) of the first `ROTARY`
dims, whose second half is the partner of the first:

    out[d] = x[d]·cos[d] - x[d + R/2]·sin[d]   for d < R/2
    out[d] = x[d]·cos[d] + x[d - R/2]·sin[d]   for R/2 <= d < R
"""

import triton
import triton.language as tl

from engine.kernels.triton.norms import normed
from engine.kernels.triton.numerics import narrow, widen


@triton.jit
def _head_normed(x, scale, norms, dims, mask, dtype: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
    """Heads x · scale · weight at `dims`; norms: weights of queries' and of keys' heads, and which are queries'."""
    q_weight_ptr, k_weight_ptr, is_query = norms
    q_weight = widen(tl.load(q_weight_ptr + dims, mask=mask, other=0.0))
    k_weight = widen(tl.load(k_weight_ptr + dims, mask=mask, other=0.0))
    weight = tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])
    return widen(normed(x, scale, weight, dtype, ADDS_ONE, ROUNDS_FIRST))


@triton.jit
def _rotated(x, y, cos_ptr, sin_ptr, dims, ROTARY: tl.constexpr):
    """Heads x turned by their token's angles; y: the partner of each dim."""
    is_rotated = dims < ROTARY
    cos = widen(tl.load(cos_ptr + dims, mask=is_rotated, other=1.0))
    sin = widen(tl.load(sin_ptr + dims, mask=is_rotated, other=0.0))
    sin = tl.where(dims < ROTARY // 2, -sin, sin)
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def _write(pages, slot_ptr, kv_heads, keys, values, dims, mask, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys are those of `kv_heads` from 0 to NUM_KV_HEADS, values those behind; pages: both, and a slot's stride."""
    k_pages_ptr, v_pages_ptr, slot_stride = pages
    slot = tl.load(slot_ptr)
    if slot >= 0:
        places = slot * slot_stride + (kv_heads % NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
        is_key = (kv_heads >= 0) & (kv_heads < NUM_KV_HEADS)
        is_value = kv_heads >= NUM_KV_HEADS
        tl.store(k_pages_ptr + places, keys, mask=mask & is_key[:, None])
        tl.store(v_pages_ptr + places, values, mask=mask & is_value[:, None])


@triton.jit(do_not_specialize=["num_written"])
def qkv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    num_written,
    qkv_stride,
    angle_stride,
    slot_stride,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`BLOCK_H` heads of one token. Rows behind `num_written` and those with a negative slot are padding."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_dim[None, :]
    row_ptr = qkv_ptr + token * qkv_stride + (heads * HEAD_DIM)[:, None]
    raw = tl.load(row_ptr + dims[None, :], mask=mask, other=0.0)
    dtype = q_out_ptr.dtype.element_ty
    norms = (q_weight_ptr, k_weight_ptr, heads < NUM_HEADS)
    x = widen(raw)
    if q_weight_ptr is not None:
        scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / HEAD_DIM + epsilon)[:, None]
        x = _head_normed(x, scale, norms, dims, is_dim, dtype, ADDS_ONE, ROUNDS_FIRST)
    if ROTARY > 0:
        partners = tl.where(dims < ROTARY // 2, dims + ROTARY // 2, dims - ROTARY // 2)
        y = widen(tl.load(row_ptr + partners[None, :], mask=mask & (dims < ROTARY)[None, :], other=0.0))
        if q_weight_ptr is not None:
            y = _head_normed(y, scale, norms, partners, dims < ROTARY, dtype, ADDS_ONE, ROUNDS_FIRST)
        x = _rotated(x, y, cos_ptr + token * angle_stride, sin_ptr + token * angle_stride, dims, ROTARY)
    x = narrow(x, dtype)
    q_places = (token * NUM_HEADS + heads) * HEAD_DIM
    tl.store(q_out_ptr + q_places[:, None] + dims[None, :], x, mask=mask & (heads < NUM_HEADS)[:, None])
    if token < num_written:
        pages = (k_pages_ptr, v_pages_ptr, slot_stride)
        _write(pages, slots_ptr + token, heads - NUM_HEADS, x, raw, dims, mask, NUM_KV_HEADS, HEAD_DIM)
