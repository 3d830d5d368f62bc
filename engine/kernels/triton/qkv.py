"""From a merged product's rows [q | k | v] to rotated queries, and keys and values in their pages.

Per head: the optional RMS norm of queries and keys, then the rotary embedding (Su et al., 2021) of the first `ROTARY`
dims, whose second half is the partner of the first:

    out[d] = x[d]·cos[d] - x[d + R/2]·sin[d]   for d < R/2
    out[d] = x[d]·cos[d] + x[d - R/2]·sin[d]   for R/2 <= d < R
"""

import triton
import triton.language as tl

from engine.kernels.triton.early import await_inputs
from engine.kernels.triton.norms import normed
from engine.kernels.triton.numerics import narrow, widen


@triton.jit
def _load_weights(q_weight_ptr, k_weight_ptr, places, mask, is_query):
    """Of each head's norm, at its `places`."""
    q_weight = tl.load(q_weight_ptr + places, mask=mask & is_query, other=0.0)
    k_weight = tl.load(k_weight_ptr + places, mask=mask & (is_query == 0), other=0.0)
    return tl.where(is_query, widen(q_weight), widen(k_weight))


@triton.jit
def _write(pages, slot, kv_heads, keys, values, dims, mask, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys are those of `kv_heads` from 0 to NUM_KV_HEADS, values those behind; pages: both, and a slot's stride."""
    k_pages_ptr, v_pages_ptr, slot_stride = pages
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
    EARLY: tl.constexpr,
):
    """`BLOCK_H` heads of one token. Rows behind `num_written` and those with a negative slot are padding.

    Everything is loaded before anything is computed, and waited for once; weights and angles by each thread for its own
    values, which spares it an exchange with the others.
    """
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    is_query = (heads < NUM_HEADS)[:, None]
    row_ptr = qkv_ptr + token * qkv_stride + (heads * HEAD_DIM)[:, None]
    raw = tl.load(row_ptr + dims[None, :], mask=mask, other=0.0)
    slot = tl.load(slots_ptr + token, mask=token < num_written, other=-1)
    places = tl.broadcast_to(dims[None, :], (BLOCK_H, BLOCK_D))
    if ROTARY > 0:
        partners = tl.where(places < ROTARY // 2, places + ROTARY // 2, places - ROTARY // 2)
        is_rotated = mask & (places < ROTARY)
        y = widen(tl.load(row_ptr + partners, mask=is_rotated, other=0.0))
        cos = widen(tl.load(cos_ptr + token * angle_stride + places, mask=is_rotated, other=1.0))
        sin = widen(tl.load(sin_ptr + token * angle_stride + places, mask=is_rotated, other=0.0))
    if q_weight_ptr is not None:
        weight = _load_weights(q_weight_ptr, k_weight_ptr, places, mask, is_query)
        if ROTARY > 0:
            y_weight = _load_weights(q_weight_ptr, k_weight_ptr, partners, is_rotated, is_query)
    dtype = q_out_ptr.dtype.element_ty
    x = widen(raw)
    if q_weight_ptr is not None:
        scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / HEAD_DIM + epsilon)[:, None]
        x = widen(normed(x, scale, weight, dtype, ADDS_ONE, ROUNDS_FIRST))
        if ROTARY > 0:
            y = widen(normed(y, scale, y_weight, dtype, ADDS_ONE, ROUNDS_FIRST))
    if ROTARY > 0:
        x = x * cos + y * tl.where(places < ROTARY // 2, -sin, sin)
    x = narrow(x, dtype)
    q_places = (token * NUM_HEADS + heads) * HEAD_DIM
    tl.store(q_out_ptr + q_places[:, None] + dims[None, :], x, mask=mask & is_query)
    if slot >= 0:
        pages = (k_pages_ptr, v_pages_ptr, slot_stride)
        _write(pages, slot, heads - NUM_HEADS, x, raw, dims, mask, NUM_KV_HEADS, HEAD_DIM)
