"""How a step's rows are cut into bands, each of which is computed by one thread at a time, beside the others.

Threads that share each product wait for each other hundreds of times in a step, and all stand still while another
process has the core of one; in bands they wait once. But each band reads all weights: it must have rows enough, and the
weights must come from a cache that the cores share. No row's bits depend on its band.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.attention.base import AttentionBatch

# Rows of a band, at least. Two threads are as fast in bands of 8 as side by side (SmolLM2-135M, AVX512). Where the
# weights of a layer do not stay in the cache that the cores share, fewer than 128 wait for memory.
MIN_ROWS = 8
MIN_ROWS_FROM_MEMORY = 128


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbouring rows of a step, and what attention is to know of them."""

    first: int  # row of the step
    batch: AttentionBatch

    @property
    def num_rows(self) -> int:
        return self.batch.num_tokens


@dataclass(frozen=True, slots=True)
class Bands:
    """All of a step. in_order: keys that a band's queries see may be of rows in bands before it."""

    parts: list[Band]
    in_order: bool


def cut_bands(batch: AttentionBatch, num_threads: int, min_rows: int) -> Bands | None:
    """A step for so many threads, in parts of nearly equal size; None where it has too few rows.

    There is one more than threads: while another process has the core of one, the others find work.
    """
    count = min(num_threads + 1, batch.num_tokens // min_rows)
    if num_threads == 1 or count < num_threads:
        return None
    starts = [batch.num_tokens * i // count for i in range(count + 1)]
    query_start = batch.query_start.tolist()
    parts = [Band(first, _part(batch, query_start, first, end)) for first, end in pairwise(starts)]
    return Bands(parts, in_order=batch.num_decodes != batch.num_tokens)


def moved(rows: Tensor, bands: Bands, room: int) -> Tensor:
    """Where the step's rows, int64 `[n]`, lie if each band has so many rows of room."""
    shifts = torch.tensor([i * room - band.first for i, band in enumerate(bands.parts)])
    ends = torch.tensor([band.first for band in bands.parts[1:]])
    return rows + shifts[torch.bucketize(rows, ends, right=True)]


def _part(batch: AttentionBatch, query_start: list[int], first: int, end: int) -> AttentionBatch:
    """Some rows of a batch; of a sequence that ends behind them as much as is before their end."""
    first_seq = bisect_right(query_start, first) - 1
    end_seq = bisect_left(query_start, end)
    context_lens = batch.context_lens[first_seq:end_seq]
    if cut_off := query_start[end_seq] - end:
        context_lens = context_lens.clone()
        context_lens[-1] -= cut_off
    return AttentionBatch(
        query_start=batch.query_start[first_seq : end_seq + 1].clamp(first, end) - first,
        context_lens=context_lens,
        block_tables=batch.block_tables[first_seq:end_seq],
        slot_mapping=batch.slot_mapping[first:end],
        num_seqs=end_seq - first_seq,
        num_tokens=end - first,
        max_query_len=min(batch.max_query_len, end - first),
        max_context_len=batch.max_context_len,
    )
