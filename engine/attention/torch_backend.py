"""Paged attention in plain torch: the twin that every kernel is held against, and the fallback without a compiler.

One arithmetic per row. The keys of a row are taken in chunks of `CHUNK_SIZE` counted from position 0, so that a row
meets the same chunks in prefill and in decode; the results of its chunks are merged in order of position:

    m' = max(m, m_c);  l' = l·e^(m-m') + l_c·e^(m_c-m');  o' = o·e^(m-m') + o_c·e^(m_c-m')

with m_c, l_c, o_c the maximum, the sum of exponentials and the weighted values of chunk c, all in float32. A sink
starts a row at m = sink, l = 1, o = 0. (Online softmax: Milakov and Gimelshein, 2018; split over keys: Dao et al.,
2023.)

Every matrix product is a batch of products of one fixed shape and layout, one for each query token and kv head: the
CPU's matrix library gives a product the same bits whatever else is in the batch, as long as it has two rows. Another
layout (a transposed view, a wider stride) may take another path, with other bits, so operands are made contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.base import SCALE_BYTES, AttentionBatch, AttentionRules

CHUNK_SIZE = 256  # keys; part of the arithmetic: another size gives other bits
_MAX_TILE_TOKENS = 256  # query tokens of one prefill tile: bounds the scratch memory, does not touch the arithmetic
_LARGEST_CODE = 127.0
_SMALLEST_SIZE = 2.0**-100  # numbers that are all below it are zeros: a scale has an inverse
_MIN_ROWS = 2  # a product with one row takes another path in the matrix library


class TorchAttention:
    """`AttentionBackend` for any device and dtype."""

    name = "torch"
    is_row_invariant = True
    build = "torch 1"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        keys, values = kv_cache_layer.flatten(1, 2).unbind(0)  # [num_slots, num_kv_heads, slot_width]
        keys.index_copy_(0, batch.slot_mapping, _narrowed(k, keys.dtype))
        values.index_copy_(0, batch.slot_mapping, _narrowed(v, values.dtype))
        num_kv_heads = keys.shape[1]
        grouped_q = q.reshape(len(q), num_kv_heads, -1, q.shape[-1]).float()  # [num_tokens, num_kv_heads, group, dim]
        pages = _Pages(keys, values, batch.block_tables.long(), block_size=kv_cache_layer.shape[2])
        output = torch.empty_like(grouped_q)
        for tokens, sequences, positions in _tiles(batch):
            output[tokens] = _attend(grouped_q[tokens], pages, sequences, positions, rules)
        return output.flatten(1, 2).to(q.dtype)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the cache holds it; what float16 has no room for becomes its largest number, as in the kernel."""
    if dtype == torch.int8:
        return _codes(x.float())
    if dtype == torch.float16 and x.dtype != dtype:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def _codes(x: Tensor) -> Tensor:
    """int8 `[..., head_dim]` with the bytes of a scale behind each row; one with a nan or an infinity has nan."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    is_zero = largest < _SMALLEST_SIZE
    inverse = torch.full_like(largest, _LARGEST_CODE).div_(largest)  # a number over a tensor would be rounded twice
    codes = (x * inverse.masked_fill_(is_zero, 0.0)).nan_to_num_(0.0).round_().to(torch.int8)
    scales = (largest / _LARGEST_CODE).masked_fill_(is_zero, 0.0).masked_fill_(~largest.isfinite(), float("nan"))
    return torch.cat((codes, scales.view(torch.int8)), dim=-1)


def _widened(rows: Tensor) -> Tensor:
    """float32 numbers of rows of a cache."""
    if rows.dtype != torch.int8:
        return rows.float()
    return rows[..., :-SCALE_BYTES].float() * rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)


@dataclass(slots=True)
class _Pages:
    keys: Tensor  # [num_slots, num_kv_heads, slot_width]
    values: Tensor
    block_tables: Tensor  # int64 [num_seqs, max_blocks]
    block_size: int

    def gather(self, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values float32 `[num_sequences, num_kv_heads, num_positions, head_dim]`.

        sequences: int64 `[num_sequences]`; positions: int64 `[num_sequences, num_positions]`.
        """
        blocks = self.block_tables[sequences[:, None], positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        keys, values = (_widened(pages[slots]).transpose(1, 2).contiguous() for pages in (self.keys, self.values))
        return keys, values


def _tiles(batch: AttentionBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut a step into tiles (tokens, sequences, positions), int64 `[num_tokens of the tile]` each but sequences.

    All decodes make one tile with a sequence for each token; a prefill makes tiles with one sequence `[1]`.
    """
    starts = batch.query_start.tolist()
    lens = batch.context_lens.tolist()
    device = batch.query_start.device
    decodes = [i for i in range(batch.num_seqs) if starts[i + 1] - starts[i] == 1]
    tiles: list[tuple[Tensor, Tensor, Tensor]] = []
    if decodes:
        tiles.append(
            (
                torch.tensor([starts[i] for i in decodes], device=device),
                torch.tensor(decodes, device=device),
                torch.tensor([lens[i] - 1 for i in decodes], device=device),
            )
        )
    for i in range(batch.num_seqs):
        if starts[i + 1] - starts[i] < 2:
            continue
        for first in range(starts[i], starts[i + 1], _MAX_TILE_TOKENS):
            tokens = torch.arange(first, min(first + _MAX_TILE_TOKENS, starts[i + 1]), device=device)
            tiles.append((tokens, torch.tensor([i], device=device), tokens + (lens[i] - starts[i + 1])))
    return tiles


def _attend(q: Tensor, pages: _Pages, sequences: Tensor, positions: Tensor, rules: AttentionRules) -> Tensor:
    """Attention of one tile. q: float32 `[num_tokens, num_kv_heads, group, head_dim]`; returns the same shape."""
    group = q.shape[2]
    if group < _MIN_ROWS:
        q = q.expand(-1, -1, _MIN_ROWS, -1)
    rows = q.shape[:3]
    if rules.sinks is None:
        maximum = q.new_full((*rows, 1), float("-inf"))
        total = q.new_zeros((*rows, 1))
    else:
        maximum = rules.sinks.float().view(1, q.shape[1], group, 1).expand(*rows, 1)
        total = q.new_ones((*rows, 1))
    output = torch.zeros_like(q)
    last = int(positions.max())
    first = 0
    if rules.sliding_window is not None:
        first = max(0, int(positions.min()) - rules.sliding_window + 1) // CHUNK_SIZE * CHUNK_SIZE
    for start in range(first, last + 1, CHUNK_SIZE):
        part = _attend_chunk(q, pages, sequences, positions, start, rules)
        maximum, total, output = _merge(maximum, total, output, *part)
    return (output / total)[:, :, :group]


def _attend_chunk(
    q: Tensor, pages: _Pages, sequences: Tensor, positions: Tensor, start: int, rules: AttentionRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exponentials and weighted values of the keys from `start` on; -inf, 0, 0 where none is seen."""
    key_positions = torch.arange(start, start + CHUNK_SIZE, device=q.device)
    seen = key_positions <= positions[:, None]  # [num_tokens, chunk]
    if rules.sliding_window is not None:
        seen &= key_positions > positions[:, None] - rules.sliding_window
    own = positions if len(sequences) > 1 else positions.max()[None]
    # Positions past a sequence's end are read at its end: pages of others may hold anything, and 0 * nan is nan.
    keys, values = pages.gather(sequences, torch.minimum(key_positions, own[:, None]))
    scores = _products(q, keys.transpose(2, 3).contiguous()) * rules.scaling  # [num_tokens, num_kv_heads, group, chunk]
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill_(~seen[:, None, None, :], float("-inf"))
    maximum = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - maximum.clamp_min(torch.finfo(torch.float32).min))
    return maximum, weights.sum(dim=-1, keepdim=True), _products(weights, values)


def _products(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows `[num_tokens, num_kv_heads, group, n]` times matrices `[num_tokens or 1, num_kv_heads, n, m]`."""
    num_tokens, num_kv_heads = rows.shape[:2]
    if matrices.shape[0] == num_tokens:
        product = torch.bmm(rows.flatten(0, 1), matrices.flatten(0, 1))
        return product.view(num_tokens, num_kv_heads, *product.shape[1:])
    shared = [torch.bmm(rows[:, h], matrices[0, h].expand(num_tokens, -1, -1)) for h in range(num_kv_heads)]
    return torch.stack(shared, dim=1)


def _merge(
    maximum: Tensor, total: Tensor, output: Tensor, chunk_maximum: Tensor, chunk_total: Tensor, chunk_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a chunk into what its rows have so far; rows that see nothing of the chunk stay as they are, to the bit."""
    merged = torch.maximum(maximum, chunk_maximum)
    seen = chunk_maximum > float("-inf")
    pivot = torch.where(seen, merged, 0.0)
    old = torch.exp(maximum - pivot)
    new = torch.exp(chunk_maximum - pivot)
    return (
        merged,
        torch.where(seen, total * old + chunk_total * new, total),
        torch.where(seen, output * old + chunk_output * new, output),
    )
