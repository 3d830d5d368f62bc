"""A short proof, at every start, that a compiled kernel computes attention: a compiler may be wrong, we may not.

Holds the kernel against the torch twin on a few small sequences with all rules on, and a decode against the same row of
a prefill, bit for bit.
"""

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionBatch
from engine.attention.torch_backend import TorchAttention
from engine.kernels.threads import one_thread

_LENGTHS = [270, 17]  # more than a chunk of keys, and less than a block of them
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 6, 2, 48, 16
_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # the output's own rounding, in bfloat16


def find_fault(backend: AttentionBackend, dtype: torch.dtype) -> str | None:
    """What is wrong with the backend on this CPU, or None."""
    with one_thread():
        return _find_fault(backend, dtype)


def _find_fault(backend: AttentionBackend, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((sum(_LENGTHS), heads, _HEAD_DIM), generator=generator).to(dtype)
        for heads in (_NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS)
    )
    cache = torch.zeros((2, 20, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM), dtype=dtype)
    ends = torch.tensor(_LENGTHS).cumsum(0) - 1
    for has_rules in (False, True):
        whole = _run(backend, (q, k, v), cache, _LENGTHS, has_rules)
        again = _run(backend, (q[ends], k[ends], v[ends]), cache, [1, 1], has_rules)
        if not torch.equal(whole[ends], again):
            return "a decode differs from the same row of a prefill"
        twin = _run(TorchAttention(), (q, k, v), cache, _LENGTHS, has_rules)
        difference = float((whole.float() - twin.float()).abs().max())
        if not difference <= _MAX_DIFFERENCE[dtype]:
            return f"it differs from its torch twin by {difference}"
    return None


def _run(
    backend: AttentionBackend,
    inputs: tuple[Tensor, Tensor, Tensor],
    cache: Tensor,
    query_lens: list[int],
    has_rules: bool,
) -> Tensor:
    """Attend with the last `query_lens` tokens of each sequence, by the plain rules or by all of them."""
    return backend.forward(
        *inputs,
        cache,
        _batch(query_lens),
        scaling=0.2,
        sliding_window=40 if has_rules else None,
        softcap=3.0 if has_rules else None,
        sinks=torch.linspace(-1, 1, _NUM_HEADS) if has_rules else None,
    )


def _batch(query_lens: list[int]) -> AttentionBatch:
    """The step of these queries; the sequences lie in blocks in reverse order."""
    slots, tables = [], torch.zeros((len(_LENGTHS), 20), dtype=torch.int32)
    next_block = 19
    for row, (length, query_len) in enumerate(zip(_LENGTHS, query_lens, strict=True)):
        count = -(-length // _BLOCK_SIZE)
        tables[row, :count] = torch.arange(next_block, next_block - count, -1)
        next_block -= count
        positions = torch.arange(length - query_len, length)
        slots.append(tables[row, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE)
    return AttentionBatch(
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(_LENGTHS, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        num_seqs=len(_LENGTHS),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_context_len=max(_LENGTHS),
    )
