"""A short proof, at every start, that a compiled kernel computes attention: a compiler may be wrong, we may not.

Holds the kernel against the torch twin on a few small sequences with all rules on, and, where a backend promises it, a
decode against the same row of a prefill, bit for bit.
"""

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionRules, slot_width
from engine.attention.torch_backend import TorchAttention
from engine.kernels.threads import one_thread

# Sequences by kind of device: more than its kernel's chunk or split of keys, and about a block of them.
_LENGTHS = {"cpu": [270, 17], "cuda": [600, 17]}
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 6, 2, 48, 16
_NUM_BLOCKS = 42
# In 16 bits the rounding of weights and outputs.
_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Of keys and values in int8 the kernel rounds queries and weights to 16 bits, its twin does not.
_MAX_OF_INT8 = 1e-3
_CPU = torch.device("cpu")


def find_fault(
    backend: AttentionBackend, dtype: torch.dtype, *, kv_dtype: torch.dtype | None = None, device: torch.device = _CPU
) -> str | None:
    """What is wrong with the backend on this device, or None. kv_dtype: of keys and values, None: dtype."""
    with one_thread(), device:
        return _find_fault(backend, dtype, kv_dtype or dtype, _LENGTHS[device.type])


def _find_fault(backend: AttentionBackend, dtype: torch.dtype, kv_dtype: torch.dtype, lengths: list[int]) -> str | None:
    q, k, v = (
        _random(sum(lengths), heads, _HEAD_DIM).to(dtype) for heads in (_NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS)
    )
    width = slot_width(_HEAD_DIM, kv_dtype)
    cache = torch.zeros((2, _NUM_BLOCKS, _BLOCK_SIZE, _NUM_KV_HEADS, width), dtype=kv_dtype)
    most = _MAX_DIFFERENCE[dtype] if kv_dtype != torch.int8 else max(_MAX_DIFFERENCE[dtype], _MAX_OF_INT8)
    ends = torch.tensor(lengths).cumsum(0) - 1
    for has_rules in (False, True):
        whole = _run(backend, (q, k, v), cache, lengths, lengths, has_rules)
        again = _run(backend, (q[ends], k[ends], v[ends]), cache, lengths, [1, 1], has_rules)
        if backend.is_row_invariant and not torch.equal(whole[ends], again):
            return "a decode differs from the same row of a prefill"
        twin = _run(TorchAttention(), (q, k, v), cache, lengths, lengths, has_rules).float()
        difference = max(float((whole.float() - twin).abs().max()), float((again.float() - twin[ends]).abs().max()))
        if not difference <= most:
            return f"it differs from its torch twin by {difference}"
    return None


def _random(*shape: int) -> Tensor:
    """The same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(len(shape) + shape[1]), device="cpu").to(
        torch.get_default_device()
    )


def _run(
    backend: AttentionBackend,
    inputs: tuple[Tensor, Tensor, Tensor],
    cache: Tensor,
    lengths: list[int],
    query_lens: list[int],
    has_rules: bool,
) -> Tensor:
    """Attend with the last `query_lens` tokens of each sequence, by the plain rules or by all of them."""
    # Where is said: what transformers makes a model under is a `linspace` that takes no device from around it, and
    # torch may take that one for its own from then on.
    sinks = torch.linspace(-1, 1, _NUM_HEADS, device=cache.device)
    rules = AttentionRules(0.2, 40, 3.0, sinks) if has_rules else AttentionRules(0.2)
    return backend.forward(*inputs, cache, _batch(lengths, query_lens), rules)


def _batch(lengths: list[int], query_lens: list[int]) -> AttentionBatch:
    """The step of these queries; the sequences lie in blocks in reverse order."""
    slots, tables = [], torch.zeros((len(lengths), _NUM_BLOCKS), dtype=torch.int32)
    next_block = _NUM_BLOCKS - 1
    for row, (length, query_len) in enumerate(zip(lengths, query_lens, strict=True)):
        count = -(-length // _BLOCK_SIZE)
        tables[row, :count] = torch.arange(next_block, next_block - count, -1)
        next_block -= count
        positions = torch.arange(length - query_len, length)
        slots.append(tables[row, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE)
    return AttentionBatch(
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        num_seqs=len(lengths),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_context_len=max(lengths),
    )
