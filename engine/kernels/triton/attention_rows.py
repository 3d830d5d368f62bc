"""What one program of paged attention does with its rows: a split of keys, a merge of two splits, the end.

Within a split, tiles of `BLOCK_N` keys are folded into (m, s, o), a row's maximum, sum of exponentials and weighted
values, by the online softmax (Milakov and Gimelshein, 2018); the splits of a row are merged in order of position (Dao
et al., 2023), all in float32 and in powers of two:

    m' = max(m, m_i);  s' = s·2^(m-m') + s_i·2^(m_i-m');  o' = o·2^(m-m') + o_i·2^(m_i-m')

A sink starts a row at m = sink, s = 1, o = 0. What a row does not see changes nothing of it, to the bit.
"""

import triton
import triton.language as tl

from engine.kernels.triton.numerics import narrow, product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bounded_scores(q, k, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2(e), `[BLOCK_M, BLOCK_N]`; bounded by softcap·tanh(score / softcap)."""
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scaling
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))
    return scores * LOG2_E


@triton.jit
def _pivot(m):
    """What is taken from exponents; a row that has seen nothing has no maximum."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def attend_split(
    q,
    positions,
    first_key,
    end_key,
    k_ptr,
    v_ptr,
    table_ptr,
    block_stride,
    slot_stride,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(m, s, o) of keys `first_key` to `end_key` of one split, for rows at `positions`; first_key begins a tile."""
    dims = tl.arange(0, q.shape[1])
    m = tl.full((q.shape[0],), float("-inf"), tl.float32)
    s = tl.zeros((q.shape[0],), tl.float32)
    o = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < end_key
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        offsets = (blocks * block_stride + (keys % BLOCK_SIZE) * slot_stride)[:, None] + dims[None, :]
        # What lies past the end may be anything, and 0 · nan is nan: it is not read.
        mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(seen, _bounded_scores(q, k, scaling, softcap, HAS_SOFTCAP), float("-inf"))
        merged = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - _pivot(merged)[:, None])
        shrink = tl.exp2(m - _pivot(merged))
        s = tl.fma(s, shrink, tl.sum(weights, 1))
        o = product(narrow(weights, k.dtype), v, o * shrink[:, None])
        m = merged
    return m, s, o


@triton.jit
def merge_split(m, s, o, split_m, split_s, split_o):
    """The rows so far with one more split. Fused multiply-adds are spelt out: no compiler chooses which product."""
    merged = tl.maximum(m, split_m)
    old = tl.exp2(m - _pivot(merged))
    new = tl.exp2(split_m - _pivot(merged))
    return merged, tl.fma(s, old, split_s * new), tl.fma(o, old[:, None], split_o * new[:, None])


@triton.jit
def start_rows(sinks_ptr, heads, is_row, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m, s, o) before any key."""
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_SINKS:
        m = tl.load(sinks_ptr + heads, mask=is_row, other=0.0) * LOG2_E
        return m, tl.full((BLOCK_M,), 1.0, tl.float32), o
    return tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32), o


@triton.jit
def store_rows(out_ptr, places, mask, s, o):
    """o / s; zeros where a row saw nothing, which only padding does."""
    values = tl.where(s[:, None] == 0, 0.0, o / tl.where(s == 0, 1.0, s)[:, None])
    tl.store(out_ptr + places, narrow(values, out_ptr.dtype.element_ty), mask=mask)
