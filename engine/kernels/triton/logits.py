"""Logits changed in place: those that a grammar rules out, and those of tokens that penalties are about."""

import triton
import triton.language as tl


@triton.jit
def mask_kernel(logits_ptr, rows_ptr, bits_ptr, row_stride, bits_stride, vocab_size, BLOCK: tl.constexpr):
    """Minus infinity for one block of one masked row, where a token's bit is 0."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    words = tl.load(bits_ptr + place * bits_stride + ids // 32, mask=mask, other=0)
    is_allowed = ((words >> (ids % 32)) & 1) != 0
    minus_infinity = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(logits_ptr + row * row_stride + ids, minus_infinity, mask=mask & (is_allowed == 0))


@triton.jit(do_not_specialize=["num_entries"])
def penalize_kernel(
    logits_ptr,
    rows_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    owners_ptr,
    token_ids_ptr,
    counts_ptr,
    places_ptr,
    before_ptr,
    row_stride,
    num_entries,
    BLOCK: tl.constexpr,
):
    """A block of (row, token) entries, each once: their penalised logits, their places and what stood there.

    Compiled without fused multiply-adds: products are rounded before they are taken, as in torch.
    """
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    owners = tl.load(owners_ptr + entries, mask=mask, other=0)
    places = tl.load(rows_ptr + owners, mask=mask, other=0) * row_stride
    places += tl.load(token_ids_ptr + entries, mask=mask, other=0)
    before = tl.load(logits_ptr + places, mask=mask, other=0.0)
    repetition = tl.load(repetition_ptr + owners, mask=mask, other=1.0)
    logits = tl.where(before > 0, tl.div_rn(before, repetition), before * repetition)
    counts = tl.load(counts_ptr + entries, mask=mask, other=0.0)
    frequency = tl.load(frequency_ptr + owners, mask=mask, other=0.0)
    logits = logits - frequency * counts
    logits = logits - tl.where(counts > 0, tl.load(presence_ptr + owners, mask=mask, other=0.0), 0.0)
    tl.store(logits_ptr + places, logits, mask=mask)
    tl.store(places_ptr + entries, places, mask=mask)
    tl.store(before_ptr + entries, before, mask=mask)
