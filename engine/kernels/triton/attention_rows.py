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
def _scores(q, k, scale):
    """Scores `[BLOCK_M, BLOCK_N]` and what makes powers of two of them: they are left unscaled, which spares a product.

    Bounded by softcap·tanh(score / softcap) unless that is None.
    """
    scaling, softcap = scale
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    factor = scaling * LOG2_E
    if softcap is not None:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite
        scores = 1 - 2 / (tl.exp2(scores * (2 * factor / softcap)) + 1)
        factor = softcap * LOG2_E
    return scores, factor


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
def first_tile(position, WINDOW: tl.constexpr, num_keys):
    """The first key of the first tile of `num_keys` of which a row at `position` sees something."""
    if WINDOW > 0:
        return tl.maximum(position - WINDOW + 1, 0) // num_keys * num_keys
    return 0


@triton.jit
def _load_blocks(table_ptr, start, end_key, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of each key of the tile that begins at `start`; 0 where a block begins past the end."""
    keys = tl.arange(0, BLOCK_N)
    # Of a tile of whole blocks it is the same as in every other tile, but for a sum.
    is_whole: tl.constexpr = BLOCK_N % BLOCK_SIZE == 0
    places = start // BLOCK_SIZE + keys // BLOCK_SIZE if is_whole else (start + keys) // BLOCK_SIZE
    return tl.load(table_ptr + places, mask=places * BLOCK_SIZE < end_key, other=0)


@triton.jit
def _fold(m, s, o, scores, factor, v):
    """The rows so far with one more tile; m is the maximum of scores times factor."""
    merged = tl.maximum(m, tl.max(scores, 1) * factor)
    weights = tl.exp2(tl.fma(scores, factor, -_pivot(merged)[:, None]))
    shrink = tl.exp2(m - _pivot(merged))
    s = tl.fma(s, shrink, tl.sum(weights, 1))
    return merged, s, product(narrow(weights, v.dtype), v, o * shrink[:, None])


@triton.jit
def attend_split(
    q,
    sight,
    first_key,
    end_key,
    pages,
    scale,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(m, s, o) of keys `first_key` to `end_key` of one split; first_key begins a tile.

    sight: the rows' positions, and the first key that one of them does not see, windows aside; pages: keys and values
    of one head, the sequence's block table, and what lies between two slots; scale: scaling and softcap, or None.
    Blocks are looked up a tile ahead of the keys that are in them, so that these can be copied ahead, too.
    """
    positions, common_end = sight
    k_ptr, v_ptr, table_ptr, slot_stride = pages
    dims = tl.arange(0, q.shape[1])[None, :]
    m = tl.full((q.shape[0],), float("-inf"), tl.float32)
    s = tl.zeros((q.shape[0],), tl.float32)
    o = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    blocks = _load_blocks(table_ptr, first_key, end_key, BLOCK_SIZE, BLOCK_N)
    for start in range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        slots = (tl.arange(0, BLOCK_N) if BLOCK_N % BLOCK_SIZE == 0 else keys) % BLOCK_SIZE
        places = ((blocks.to(tl.int64) * BLOCK_SIZE + slots) * slot_stride)[:, None] + dims
        blocks = _load_blocks(table_ptr, start + BLOCK_N, end_key, BLOCK_SIZE, BLOCK_N)
        # What lies past the end may be anything: no row sees such a key, but 0 · nan is nan, so no value is read.
        k = tl.load(k_ptr + places, mask=dims < HEAD_DIM, other=0.0)
        v = tl.load(v_ptr + places, mask=(keys < end_key)[:, None] & (dims < HEAD_DIM), other=0.0)
        scores, factor = _scores(q, k, scale)
        if (WINDOW > 0) | (start + BLOCK_N > common_end):
            seen = keys[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        m, s, o = _fold(m, s, o, scores, factor, v)
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
    rows,
    q,
    sight,
    first_key,
    end_key,
    pages,
    scale,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(s, o) of the rows so far with all keys from `first_key` to `end_key`, split by split; SPLIT 0: all are one.

    One is a loop of one turn, known as such to the compiler: it keeps no second set of rows in registers.
    """
    m, s, o = rows
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
            q, sight, first, end, pages, scale, WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N
        )
        m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    return s, o


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
