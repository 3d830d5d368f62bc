"""Paged attention: one arithmetic per row, the keys in splits of a fixed size from position 0.

Decode spreads a row's splits over programs and merges them in a second kernel; prefill merges them as it goes, or takes
all keys as one split, which needs half the registers. The rows of a program are the query heads of one kv head (GQA),
for as many query tokens of one sequence as it has room for.
"""

import triton
import triton.language as tl

from engine.kernels.triton.attention_rows import (
    attend_keys,
    attend_split,
    first_tile,
    load_rows,
    merge_split,
    start_rows,
    store_part,
    store_rows,
)
from engine.kernels.triton.early import await_inputs


@triton.jit
def _decoded_token(query_start_ptr, sequence, IS_MIXED: tl.constexpr):
    """The row of a sequence's only query token; -1 if it has none or several, as it may in a mixed step."""
    if IS_MIXED:
        token = tl.load(query_start_ptr + sequence)
        is_decode = tl.load(query_start_ptr + sequence + 1) - token == 1
        return tl.where(is_decode, token, -1).to(tl.int64)
    return sequence


@triton.jit
def _pages(k_ptr, v_ptr, shift, table_ptr, slot_stride):
    """Where one head's keys and values of a sequence lie; shift: of the head in a slot."""
    return k_ptr + shift, v_ptr + shift, table_ptr, slot_stride


@triton.jit
def _store_only_part(out_ptr, sinks_ptr, heads, first_place, is_row, mask, part, HEAD_DIM: tl.constexpr):
    """Rows whose keys are all in one split."""
    m, s, o = start_rows(sinks_ptr, heads, is_row, mask.shape[0], mask.shape[1])
    m, s, o = merge_split(m, s, o, part[0], part[1], part[2])
    store_rows(out_ptr, first_place + heads, mask, s, o, HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sinks_ptr,
    tables_ptr,
    query_start_ptr,
    context_lens_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    slot_stride,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_MIXED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One (kv head, split, sequence), to the output, or to parts `[num_seqs, num_heads, num_splits, HEAD_DIM + 4]`."""
    await_inputs(EARLY)
    head, split = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    token = _decoded_token(query_start_ptr, sequence, IS_MIXED)
    end = tl.load(context_lens_ptr + sequence)
    first_key = tl.maximum(split * SPLIT, first_tile(end - 1, WINDOW, BLOCK_N))
    # A graph has the splits of the longest context that it is for; the merge reads none behind the end.
    if (token < 0) | (IS_SPLIT & (first_key >= end)):
        return
    rows = tl.arange(0, BLOCK_M)
    is_row = rows < GROUP
    mask = is_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    heads = head * GROUP + rows
    q = load_rows(q_ptr, token, heads, q_token_stride, q_head_stride, mask)
    sight = tl.zeros((BLOCK_M,), tl.int32) + (end - 1), end
    pages = _pages(k_ptr, v_ptr, head * HEAD_DIM, tables_ptr + sequence * table_stride, slot_stride)
    end_key = tl.minimum(end, (split + 1) * SPLIT)
    part = attend_split(q, sight, first_key, end_key, pages, (scaling, softcap), WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N)
    num_heads = tl.num_programs(0) * GROUP
    if IS_SPLIT:
        places = (sequence * num_heads + heads) * tl.num_programs(1) + split
        store_part(out_ptr, places, is_row, mask, part, HEAD_DIM)
    else:
        _store_only_part(out_ptr, sinks_ptr, heads, token * num_heads, is_row, mask, part, HEAD_DIM)


@triton.jit(do_not_specialize=["num_splits", "split_size"])
def merge_kernel(
    parts_ptr,
    out_ptr,
    sinks_ptr,
    query_start_ptr,
    context_lens_ptr,
    num_splits,
    split_size,
    num_heads,
    WINDOW: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One (head, sequence): the splits of `parts` in order of position."""
    await_inputs(EARLY)
    sequence = tl.program_id(1).to(tl.int64)
    token = _decoded_token(query_start_ptr, sequence, IS_MIXED)
    if token < 0:
        return
    end = tl.load(context_lens_ptr + sequence)
    dims = tl.arange(0, BLOCK_D)
    heads = tl.program_id(0) + tl.zeros((1,), tl.int32)
    is_row = heads < num_heads
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = sequence * num_heads + heads
    m, s, o = start_rows(sinks_ptr, heads, is_row, 1, BLOCK_D)
    first_split = first_tile(end - 1, WINDOW, split_size) // split_size
    for split in tl.range(first_split, tl.cdiv(end, split_size), num_stages=5):
        part = (places * num_splits + split) * (HEAD_DIM + 4)
        split_o = tl.load(parts_ptr + part[:, None] + dims[None, :], mask=mask, other=0.0)
        split_m = tl.load(parts_ptr + part + HEAD_DIM)
        split_s = tl.load(parts_ptr + part + HEAD_DIM + 1)
        m, s, o = merge_split(m, s, o, split_m, split_s, split_o)
    store_rows(out_ptr, token * num_heads + heads, mask, s, o, HEAD_DIM)


@triton.jit
def find_tile(query_start_ptr, first_sequence, num_seqs, TOKENS: tl.constexpr, SEQS: tl.constexpr):
    """The sequence that this program has a tile of, its first row of the step, how many it has, and the first of the
    tile, which may lie behind them: sequence i's first tile is query_start[i] // TOKENS + i.

    SEQS: sequences at most. All are looked at at once: a search would wait for memory again and again. The last tiles
    of a sequence, which see most keys, come first: nothing long is left for the end.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    origin = tl.load(query_start_ptr + first_sequence)
    places = tl.arange(0, SEQS)
    is_sequence = first_sequence + places < num_seqs
    starts = tl.load(query_start_ptr + first_sequence + places, mask=is_sequence, other=0)
    is_before = is_sequence & ((starts - origin) // TOKENS + places <= tile)
    place = tl.sum(is_before.to(tl.int32), 0) - 1
    sequence = first_sequence + place
    start = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - start
    return sequence, start, num_queries, (tile - (start - origin) // TOKENS - place) * TOKENS


@triton.jit(do_not_specialize=["first_sequence", "num_seqs", "is_mixed", "table_stride"])
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
    is_mixed,
    q_token_stride,
    q_head_stride,
    table_stride,
    slot_stride,
    scaling,
    softcap,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEQS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One (tile of query tokens of one sequence, kv head): splits are merged on the way; SPLIT 0: all keys are one."""
    await_inputs(EARLY)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    sequence, start, num_queries, first = find_tile(query_start_ptr, first_sequence, num_seqs, TOKENS, SEQS)
    if (first >= num_queries) | ((is_mixed != 0) & (num_queries == 1)):
        return
    rows = tl.arange(0, BLOCK_M)
    queries = first + rows // GROUP
    is_row = (rows < TOKENS * GROUP) & (queries < num_queries)
    mask = is_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    heads = tl.program_id(1) * GROUP + rows % GROUP
    tokens = (start + queries).to(tl.int64)
    q = load_rows(q_ptr, tokens, heads, q_token_stride, q_head_stride, mask)
    before = tl.load(context_lens_ptr + sequence) - num_queries  # keys before the step's
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    s, o = attend_keys(
        start_rows(sinks_ptr, heads, is_row, BLOCK_M, BLOCK_D),
        q,
        (before + queries, before + first + 1),
        first_tile(before + first, WINDOW, BLOCK_N),
        before + tl.minimum(first + TOKENS, num_queries),
        _pages(k_ptr, v_ptr, tl.program_id(1) * HEAD_DIM, table_ptr, slot_stride),
        (scaling, softcap),
        WINDOW,
        BLOCK_SIZE,
        HEAD_DIM,
        SPLIT,
        BLOCK_N,
    )
    store_rows(out_ptr, tokens * (tl.num_programs(1) * GROUP) + heads, mask, s, o, HEAD_DIM)
