"""Paged attention on a GPU through engine/kernels/triton: checks shapes, chooses tiles and grids, launches.

A step's leading sequences with one query token are decodes: their keys are split over programs. All others go through
the prefill kernel. In a graph, which serves steps of any such division, the kernels find out on the device whose each
sequence is. Both have one arithmetic, and with `deterministic` one tile and one size of splits as well, so that a row
has the same bits in either; else a prefill takes a larger tile and all keys as one split, and the splits of few
sequences are smaller and many of some length have none, which is faster and gives other last bits.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from engine.attention.base import AttentionBatch, AttentionRules
from engine.kernels.triton.attention import decode_kernel, merge_kernel, prefill_kernel
from engine.kernels.triton.early import early_launch
from engine.kernels.triton.kv_write import write_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = 512  # keys; part of the arithmetic: another size gives other bits
_SMALLEST_SPLIT = 4  # of them
_UNSPLIT = 2  # times as many keys are not worth a merge; more of them would end long after the others' few
_ENOUGH_PROGRAMS = 512  # to keep a GPU's memory busy: some for each of its multiprocessors
_TILE_KEYS = 128  # likewise, at most; a split is a whole number of tiles
_TILE_BYTES = 16_384  # of a tile's keys, at most: several such tiles are on their way into a GPU's shared memory
_MANY_PROGRAMS = 1024  # from here on a decode's tiles are twice as large: fewer programs at once keep memory as busy
_MIN_ROWS = 16  # the fewest rows of a tensor core's product
_PREFILL_ROWS = 64
_PREFILL_STAGES = 3  # two tiles are on their way while another is computed
_EARLIER_PREFILL_STAGES = 2  # before Hopper: of its shared memory others have half
_DECODE_STAGES = 2  # one tile is on its way while another is computed; more would leave room for fewer programs
_DECODE_WARPS = 4
_MOST_PART_BYTES = 1 << 29  # of splits that wait for their merge: where they would be more, sequences take turns
_TURN_STEP = 16  # sequences: behind so many, arrays are aligned as at their beginning, which kernels are compiled for


class TritonAttention:
    """`AttentionBackend` for float32, bfloat16 and float16 on CUDA; on a CPU under Triton's interpreter."""

    name = "triton"

    def __init__(self, *, deterministic: bool = False) -> None:
        self.is_row_invariant = deterministic
        one_tile = f" one tile of {_TILE_KEYS}" if deterministic else ""
        self.build = f"triton {triton.__version__} scaled exponents split {SPLIT}{one_tile}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        self.write(k, v, kv_cache_layer, batch)
        return self.attend(q, kv_cache_layer, batch, rules)

    def write(self, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch) -> None:
        """Put keys and values `[num_tokens, num_kv_heads, head_dim]` into their slots; negative ones are padding."""
        keys, values = kv_cache_layer.unbind(0)
        _check_pages(keys)
        k, v = map(_laid_out, (k, v))
        size = keys.shape[2] * keys.shape[3]
        write_kernel[(len(k),)](
            k,
            v,
            keys,
            values,
            batch.slot_mapping,
            *k.stride()[:2],
            *v.stride()[:2],
            keys.stride(1),
            SIZE=size,
            HEAD_DIM=keys.shape[3],
            BLOCK=triton.next_power_of_2(size),
        )

    def attend(self, q: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules) -> Tensor:
        """`forward` over pages that hold the step's keys and values already."""
        keys = kv_cache_layer[0]
        _check_pages(keys)
        if q.dtype != keys.dtype:
            q = q.to(keys.dtype)
        q = _laid_out(q)
        assert q.shape[1] % keys.shape[2] == 0 and q.shape[2] == keys.shape[3], "q fits the cache"
        sinks = None if rules.sinks is None else rules.sinks.detach().float().contiguous()
        rules = replace(rules, softcap=rules.softcap or None, sinks=sinks)
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decodes = _num_decodes(batch)
        num_known = 0 if batch.is_open else num_decodes
        if num_decodes:
            self._decode(q, kv_cache_layer, output, batch, num_decodes, rules)
        if num_known < batch.num_seqs:
            self._prefill(q, kv_cache_layer, output, batch, num_known, rules)
        return output

    def _prefill(
        self,
        q: Tensor,
        layer: Tensor,
        output: Tensor,
        batch: AttentionBatch,
        first_sequence: int,
        rules: AttentionRules,
    ) -> None:
        group = q.shape[1] // layer.shape[3]
        # In float32, which has no tensor cores, the registers of a large tile do not suffice by far.
        has_small_tile = self.is_row_invariant or q.dtype == torch.float32
        num_rows = _num_rows(group) if has_small_tile else max(_num_rows(group), _PREFILL_ROWS)
        num_tokens = num_rows // group
        early = early_launch(q)
        # As many tiles as there can be: every sequence may end in the middle of one.
        num_tiles = (batch.num_tokens - first_sequence) // num_tokens + batch.num_seqs - first_sequence
        prefill_kernel[(num_tiles, layer.shape[3])](
            q,
            layer[0],
            layer[1],
            output,
            rules.sinks,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            first_sequence,
            batch.num_seqs,
            int(batch.is_open),
            *q.stride()[:2],
            batch.block_tables.stride(0),
            layer.stride(2),
            rules.scaling,
            rules.softcap,
            **_constants(q, layer, rules, num_rows, _tile_keys(layer)),
            SPLIT=SPLIT if self.is_row_invariant else 0,
            SEQS=_num_places(batch.num_seqs - first_sequence),
            # A thread holds so many of the output's values that two warpgroups share a wide head's tile.
            num_warps=8 if num_rows * q.shape[2] > 64 * 128 else 4,
            num_stages=_PREFILL_STAGES if early["EARLY"] else _EARLIER_PREFILL_STAGES,
            **early,
        )

    def _decode(
        self, q: Tensor, layer: Tensor, output: Tensor, batch: AttentionBatch, num_decodes: int, rules: AttentionRules
    ) -> None:
        tiling = self._decode_tiling(layer, batch, num_decodes)
        bytes_of_one = 4 * q.shape[1] * tiling.num_splits * (q.shape[2] + 4)
        num_at_once = max(1, _MOST_PART_BYTES // bytes_of_one // _TURN_STEP) * _TURN_STEP
        while num_decodes > num_at_once:
            _decode_some(q, layer, output, batch, num_at_once, rules, tiling)
            batch, num_decodes = _behind(batch, num_at_once), num_decodes - num_at_once
            if not batch.is_open:  # else they find their rows by `query_start`
                q, output = q[num_at_once:], output[num_at_once:]
        _decode_some(q, layer, output, batch, num_decodes, rules, tiling)

    def kernels_of(self, batch: AttentionBatch, kv_cache_layer: Tensor) -> Hashable:
        """See `PagedBackend.kernels_of`."""
        num_decodes = _num_decodes(batch)
        tiling = self._decode_tiling(kv_cache_layer, batch, num_decodes)
        num_prefills = batch.num_seqs - (0 if batch.is_open else num_decodes)
        return batch.is_open, tiling.tile_keys, tiling.split, num_prefills and _num_places(num_prefills)

    def _decode_tiling(self, layer: Tensor, batch: AttentionBatch, num_decodes: int) -> "_DecodeTiling":
        programs = num_decodes * layer.shape[3]
        tile_bytes = _TILE_BYTES if self.is_row_invariant or programs < _MANY_PROGRAMS else 2 * _TILE_BYTES
        tile_keys = _tile_keys(layer, tile_bytes)
        split = SPLIT
        if not self.is_row_invariant:
            split = choose_split(programs, batch.max_context_len, least=tile_keys)
        num_splits = triton.cdiv(batch.max_context_len, split)
        # Nothing depends on the size of an only split: all have one kernel.
        return _DecodeTiling(tile_keys, split if num_splits > 1 else _UNSPLIT * SPLIT, num_splits)


@dataclass(frozen=True, slots=True)
class _DecodeTiling:
    tile_keys: int
    split: int  # keys
    num_splits: int


def _behind(batch: AttentionBatch, count: int) -> AttentionBatch:
    """The batch without its first sequences, as far as a decode looks at it."""
    return replace(
        batch,
        query_start=batch.query_start[count:],
        context_lens=batch.context_lens[count:],
        block_tables=batch.block_tables[count:],
    )


def _decode_some(
    q: Tensor,
    layer: Tensor,
    output: Tensor,
    batch: AttentionBatch,
    count: int,
    rules: AttentionRules,
    tiling: _DecodeTiling,
) -> None:
    """The batch's first `count` sequences."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = layer.shape[3]
    is_split = tiling.num_splits > 1
    target = output
    if is_split:
        shape = (count, num_heads, tiling.num_splits, head_dim + 4)
        target = torch.empty(shape, dtype=torch.float32, device=q.device)
    # In this order neighbours read one page at a time, and programs that have nothing to do come between others.
    decode_kernel[(num_kv_heads, tiling.num_splits, count)](
        q,
        layer[0],
        layer[1],
        target,
        rules.sinks,
        batch.block_tables,
        batch.query_start,
        batch.context_lens,
        *q.stride()[:2],
        batch.block_tables.stride(0),
        layer.stride(2),
        rules.scaling,
        rules.softcap,
        **_constants(q, layer, rules, _num_rows(num_heads // num_kv_heads), tiling.tile_keys),
        SPLIT=tiling.split,
        IS_SPLIT=is_split,
        IS_MIXED=batch.is_open,
        num_warps=_DECODE_WARPS,
        num_stages=_DECODE_STAGES,
        **early_launch(q),
    )
    if is_split:
        _merge(target, output, batch, rules, split=tiling.split)


def _merge(parts: Tensor, output: Tensor, batch: AttentionBatch, rules: AttentionRules, *, split: int) -> None:
    """parts: `[num_decodes, num_heads, num_splits, head_dim + 4]`, each of `split` keys."""
    num_decodes, num_heads, num_splits, _ = parts.shape
    head_dim = output.shape[2]
    merge_kernel[(num_heads, num_decodes)](
        parts,
        output,
        rules.sinks,
        batch.query_start,
        batch.context_lens,
        num_splits,
        split,
        num_heads,
        WINDOW=rules.sliding_window or 0,
        IS_MIXED=batch.is_open,
        HEAD_DIM=head_dim,
        BLOCK_D=_padded(head_dim),
        num_warps=1,
        **early_launch(output),
    )


def choose_split(num_programs: int, max_context_len: int, *, least: int) -> int:
    """Keys of a split, so that few sequences occupy a GPU too, and many of some length need no merge.

    num_programs: without splits; least: a tile of keys.
    """
    if num_programs >= _ENOUGH_PROGRAMS and max_context_len <= _UNSPLIT * SPLIT:
        return _UNSPLIT * SPLIT
    split = SPLIT
    while split > max(SPLIT // _SMALLEST_SPLIT, least) and max_context_len > split // 2:
        if num_programs * triton.cdiv(max_context_len, split // 2) > _ENOUGH_PROGRAMS:
            break
        split //= 2
    return split


def _constants(q: Tensor, layer: Tensor, rules: AttentionRules, num_rows: int, tile_keys: int) -> dict[str, Any]:
    _, _, block_size, num_kv_heads, head_dim = layer.shape
    return {
        "WINDOW": rules.sliding_window or 0,
        "GROUP": q.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": num_rows,
        "BLOCK_N": tile_keys,
        "BLOCK_D": _padded(head_dim),
    }


def _num_decodes(batch: AttentionBatch) -> int:
    """Leading sequences that have one token, or may have."""
    return batch.num_seqs if batch.max_query_len == 1 or batch.is_open else batch.num_decodes


def _tile_keys(layer: Tensor, tile_bytes: int = _TILE_BYTES) -> int:
    return max(16, min(_TILE_KEYS, tile_bytes // (_padded(layer.shape[4]) * layer.element_size())))


def _num_places(num_seqs: int) -> int:
    """Places among which a program looks for its sequence: few different ones, since a kernel is compiled for each."""
    places = 32
    while places < num_seqs:
        places *= 4
    return places


def _padded(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def _num_rows(group: int) -> int:
    """Rows of a tile that holds one query token's heads of one kv head."""
    return max(_MIN_ROWS, int(triton.next_power_of_2(group)))


def _laid_out(rows: Tensor) -> Tensor:
    """`[num_tokens, num_heads, head_dim]` with strides that a kernel knows: it is compiled for multiples of 16 and for
    others, and where heads are none, a stride over all tokens is now this and now that."""
    return rows if rows.stride(2) == 1 and rows.shape[2] % 16 == 0 else rows.contiguous()


def _check_pages(pages: Tensor) -> None:
    assert pages.dtype in DTYPES, "pages of a float dtype"
    assert pages.stride(3) == 1 and pages.stride(2) == pages.shape[3], "the heads of a slot follow each other"
    assert pages.stride(0) == pages.shape[1] * pages.stride(1), "the slots of all blocks follow each other"
