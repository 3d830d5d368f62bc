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
def _head_weights(q_weight_ptr, k_weight_ptr, is_query, dims, mask):
    """Norm weights of queries' and of keys' heads, float32 `[BLOCK_H, BLOCK_D]`."""
    q_weight = widen(tl.load(q_weight_ptr + dims, mask=mask, other=0.0))
    k_weight = widen(tl.load(k_weight_ptr + dims, mask=mask, other=0.0))
    return tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])


@triton.jit
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
    HAS_NORMS: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`BLOCK_H` heads of one token. Rows behind `num_written` and those with a negative slot are padding."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    is_dim = dims < HEAD_DIM
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_dim[None, :]
    row_ptr = qkv_ptr + token * qkv_stride + (heads * HEAD_DIM)[:, None]
    raw = tl.load(row_ptr + dims[None, :], mask=mask, other=0.0)
    dtype = q_out_ptr.dtype.element_ty
    x = widen(raw)
    scale = tl.full((BLOCK_H, 1), 1.0, tl.float32)
    if HAS_NORMS:
        scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / HEAD_DIM + epsilon)[:, None]
        weight = _head_weights(q_weight_ptr, k_weight_ptr, is_query, dims, is_dim)
        x = widen(normed(x, scale, weight, dtype, ADDS_ONE, ROUNDS_FIRST))
    if ROTARY > 0:
        partners = tl.where(dims < ROTARY // 2, dims + ROTARY // 2, dims - ROTARY // 2)
        is_rotated = dims < ROTARY
        y = widen(tl.load(row_ptr + partners[None, :], mask=mask & is_rotated[None, :], other=0.0))
        if HAS_NORMS:
            weight = _head_weights(q_weight_ptr, k_weight_ptr, is_query, partners, is_rotated)
            y = widen(normed(y, scale, weight, dtype, ADDS_ONE, ROUNDS_FIRST))
        cos = widen(tl.load(cos_ptr + token * angle_stride + dims, mask=is_rotated, other=1.0))
        sin = widen(tl.load(sin_ptr + token * angle_stride + dims, mask=is_rotated, other=0.0))
        sin = tl.where(dims < ROTARY // 2, -sin, sin)
        x = x * cos[None, :] + y * sin[None, :]
    rotated = narrow(x, dtype)
    q_places = (token * NUM_HEADS + heads) * HEAD_DIM
    tl.store(q_out_ptr + q_places[:, None] + dims[None, :], rotated, mask=mask & is_query[:, None])
    if token < num_written:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            kv_heads = (heads - NUM_HEADS) % NUM_KV_HEADS
            places = slot * slot_stride + kv_heads[:, None] * HEAD_DIM + dims[None, :]
            is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
            tl.store(k_pages_ptr + places, rotated, mask=mask & is_key[:, None])
            tl.store(v_pages_ptr + places, raw, mask=mask & is_value[:, None])
