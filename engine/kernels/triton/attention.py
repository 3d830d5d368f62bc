"""Paged attention: one arithmetic per row, the keys in splits of a fixed size from position 0.

Decode spreads a row's splits over programs and merges them in a second kernel; prefill merges them as it goes, or takes
all keys as one split, which needs half the registers. The rows of a program are the query heads of one kv head (GQA),
for as many query tokens of one sequence as it has room for.
"""

import triton
import triton.language as tl

from engine.kernels.triton.attention_rows import attend_split, merge_split, start_rows, store_rows


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    parts_ptr,
    sinks_ptr,
    tables_ptr,
    context_lens_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (sequence, kv head, split), to the output or to parts `[num_seqs, num_heads, num_splits, HEAD_DIM + 2]`."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(context_lens_ptr + sequence)
    first_key = split * SPLIT
    if WINDOW > 0:
        first_key = tl.maximum(first_key, tl.maximum(end - WINDOW, 0) // BLOCK_N * BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = sequence.to(tl.int64) * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    positions = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    m, s, o = attend_split(
        q,
        positions,
        first_key,
        tl.minimum(end, (split + 1) * SPLIT),
        k_ptr + kv_head * head_stride,
        v_ptr + kv_head * head_stride,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        block_stride,
        slot_stride,
        scaling,
        softcap,
        WINDOW,
        HAS_SOFTCAP,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_N,
    )
    num_heads = tl.num_programs(1) * GROUP
    places = sequence.to(tl.int64) * num_heads + heads
    if IS_SPLIT:
        parts = (places * tl.num_programs(2) + split) * (HEAD_DIM + 2)
        tl.store(parts_ptr + parts[:, None] + dims[None, :], o, mask=mask)
        tl.store(parts_ptr + parts + HEAD_DIM, m, mask=rows < GROUP)
        tl.store(parts_ptr + parts + HEAD_DIM + 1, s, mask=rows < GROUP)
    else:
        start_m, start_s, start_o = start_rows(sinks_ptr, heads, rows < GROUP, HAS_SINKS, BLOCK_M, BLOCK_D)
        m, s, o = merge_split(start_m, start_s, start_o, m, s, o)
        store_rows(out_ptr, places[:, None] * HEAD_DIM + dims[None, :], mask, s, o)


@triton.jit
def merge_kernel(
    parts_ptr,
    out_ptr,
    sinks_ptr,
    context_lens_ptr,
    num_splits,
    num_heads,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (sequence, head): the splits of `parts` in order of position."""
    sequence = tl.program_id(0)
    end = tl.load(context_lens_ptr + sequence)
    dims = tl.arange(0, BLOCK_D)
    heads = tl.program_id(1) + tl.zeros((1,), tl.int32)
    is_row = heads < num_heads
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = sequence.to(tl.int64) * num_heads + heads
    m, s, o = start_rows(sinks_ptr, heads, is_row, HAS_SINKS, 1, BLOCK_D)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(end - WINDOW, 0) // SPLIT
    for split in range(first, tl.cdiv(end, SPLIT)):
        part = (places * num_splits + split) * (HEAD_DIM + 2)
        split_o = tl.load(parts_ptr + part[:, None] + dims[None, :], mask=mask, other=0.0)
        split_m = tl.load(parts_ptr + part + HEAD_DIM)
        split_s = tl.load(parts_ptr + part + HEAD_DIM + 1)
        m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    store_rows(out_ptr, places[:, None] * HEAD_DIM + dims[None, :], mask, s, o)


@triton.jit
def find_sequence(query_start_ptr, tile, first_sequence, num_seqs, TOKENS: tl.constexpr):
    """The sequence whose query a tile belongs to: sequence i's first tile is query_start[i] // TOKENS + i."""
    origin = tl.load(query_start_ptr + first_sequence)
    low = first_sequence
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first_tile = (tl.load(query_start_ptr + middle) - origin) // TOKENS + middle - first_sequence
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1, origin


@triton.jit(do_not_specialize=["first_sequence", "num_seqs"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sinks_ptr,
    tables_ptr,
    query_start_ptr,
    context_lens_ptr,
    first_sequence,
    num_seqs,
    q_token_stride,
    q_head_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (tile of query tokens of one sequence, kv head): splits are merged on the way, or all keys are one."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, origin = find_sequence(query_start_ptr, tile, first_sequence, num_seqs, TOKENS)
    start = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - start
    first = (tile - (start - origin) // TOKENS - (sequence - first_sequence)) * TOKENS  # query of the sequence
    if first >= num_queries:
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    queries = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (queries < num_queries)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (start + queries).to(tl.int64)
    q_offsets = tokens * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    shift = tl.load(context_lens_ptr + sequence) - num_queries  # keys before the step's
    end = shift + tl.minimum(first + TOKENS, num_queries)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(shift + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    m, s, o = start_rows(sinks_ptr, heads, is_row, HAS_SINKS, BLOCK_M, BLOCK_D)
    if IS_SPLIT:
        for split in range(first_key // SPLIT, tl.cdiv(end, SPLIT)):
            split_m, split_s, split_o = attend_split(
                q,
                shift + queries,
                tl.maximum(first_key, split * SPLIT),
                tl.minimum(end, (split + 1) * SPLIT),
                k_ptr,
                v_ptr,
                table_ptr,
                block_stride,
                slot_stride,
                scaling,
                softcap,
                WINDOW,
                HAS_SOFTCAP,
                BLOCK_SIZE,
                HEAD_DIM,
                BLOCK_N,
            )
            m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    else:
        split_m, split_s, split_o = attend_split(
            q,
            shift + queries,
            first_key,
            end,
            k_ptr,
            v_ptr,
            table_ptr,
            block_stride,
            slot_stride,
            scaling,
            softcap,
            WINDOW,
            HAS_SOFTCAP,
            BLOCK_SIZE,
            HEAD_DIM,
            BLOCK_N,
        )
        m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    places = (tokens * (tl.num_programs(1) * GROUP) + heads)[:, None] * HEAD_DIM + dims[None, :]
    store_rows(out_ptr, places, mask, s, o)
