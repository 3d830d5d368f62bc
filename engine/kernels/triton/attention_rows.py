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
def _bounded_scores(q, k, scaling, softcap):
    """Scores times log2(e), `[BLOCK_M, BLOCK_N]`; bounded by softcap·tanh(score / softcap) unless that is None."""
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scaling
    if softcap is not None:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))
    return scores * LOG2_E


@triton.jit
def _pivot(m):
    """What is taken from exponents; a row that has seen nothing has no maximum."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_rows(q_ptr, tokens, heads, token_stride, head_stride, mask):
    """The queries of rows (token, head), as wide as the mask."""
    offsets = tokens * token_stride + heads * head_stride
    return tl.load(q_ptr + offsets[:, None] + tl.arange(0, mask.shape[1])[None, :], mask=mask, other=0.0)


@triton.jit
def first_tile(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile of which a row at `position` sees something."""
    if WINDOW > 0:
        return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return 0


@triton.jit
def attend_split(
    q,
    positions,
    first_key,
    end_key,
    pages,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(m, s, o) of keys `first_key` to `end_key` of one split, for rows at `positions`; first_key begins a tile.

    pages: keys and values of one head, the sequence's block table, and what lies between two slots.
    """
    k_ptr, v_ptr, table_ptr, slot_stride = pages
    dims = tl.arange(0, q.shape[1])
    m = tl.full((q.shape[0],), float("-inf"), tl.float32)
    s = tl.zeros((q.shape[0],), tl.float32)
    o = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < end_key
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        offsets = ((blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * slot_stride)[:, None] + dims[None, :]
        # What lies past the end may be anything, and 0 · nan is nan: it is not read.
        mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(seen, _bounded_scores(q, k, scaling, softcap), float("-inf"))
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
def attend_keys(
    m,
    s,
    o,
    q,
    positions,
    first_key,
    end_key,
    pages,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The rows so far with all keys from `first_key` to `end_key`, split by split; SPLIT 0: all are one.

    One is a loop of one turn, known as such to the compiler: it keeps no second set of rows in registers.
    """
    first_split = 0
    end_split = 1
    if SPLIT > 0:
        first_split = first_key // SPLIT
        end_split = tl.cdiv(end_key, SPLIT)
    for split in range(first_split, end_split):
        first = first_key
        end = end_key
        if SPLIT > 0:
            first = tl.maximum(first_key, split * SPLIT)
            end = tl.minimum(end_key, (split + 1) * SPLIT)
        split_m, split_s, split_o = attend_split(
            q, positions, first, end, pages, scaling, softcap, WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N
        )
        m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    return m, s, o


@triton.jit
def start_rows(sinks_ptr, heads, is_row, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m, s, o) before any key; sinks_ptr: None where there are none."""
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sinks_ptr is not None:
        m = tl.load(sinks_ptr + heads, mask=is_row, other=0.0) * LOG2_E
        return m, tl.full((BLOCK_M,), 1.0, tl.float32), o
    return tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32), o


@triton.jit
def store_rows(out_ptr, places, mask, s, o, HEAD_DIM: tl.constexpr):
    """o / s; zeros where a row saw nothing, which only padding does."""
    values = tl.where(s[:, None] == 0, 0.0, o / tl.where(s == 0, 1.0, s)[:, None])
    offsets = (places * HEAD_DIM)[:, None] + tl.arange(0, o.shape[1])[None, :]
    tl.store(out_ptr + offsets, narrow(values, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_part(parts_ptr, places, is_row, mask, part, HEAD_DIM: tl.constexpr):
    """A split's (m, s, o) for a later merge, two values behind each, and two of padding: whole vectors are stored."""
    m, s, o = part
    part_ptr = parts_ptr + places * (HEAD_DIM + 4)
    tl.store(part_ptr[:, None] + tl.arange(0, o.shape[1])[None, :], o, mask=mask)
    tl.store(part_ptr + HEAD_DIM, m, mask=is_row)
    tl.store(part_ptr + HEAD_DIM + 1, s, mask=is_row)
