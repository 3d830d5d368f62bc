"""Paged attention on a CPU through engine/kernels/attention.c: checks shapes and passes pointers.

The kernel is compiled when the backend is made; it shares torch's OpenMP threads. Its pages are laid out for it: of a
block's keys, `[num_kv_heads, head_dim, block_size]`, and of its values, `[num_kv_heads, block_size, head_dim]`.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from engine.attention.base import AttentionBatch, AttentionRules
from engine.kernels.build import build_library, load_library

DTYPES = (torch.float32, torch.bfloat16)
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # half.h's; the last for keys and values alone

# `attention_args` of attention.c: eleven pointers, seven 64-bit and ten 32-bit integers, two floats. Packed at once,
# because setting the fields of a ctypes structure one by one costs more than a short attention itself.
_ARGUMENTS = struct.Struct("@11P7q10i2f")


class NativeAttention:
    """`AttentionBackend` for float32 and bfloat16 on a CPU. Raises `KernelBuildError` where it cannot be compiled."""

    name = "native"
    is_row_invariant = True

    def __init__(self, kernels_dir: Path) -> None:
        path = build_library("attention", kernels_dir)
        library = load_library(path)
        self.build = path.stem
        self._attend = library.promptmill_attention

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        q, k, v = _with_dense_rows(q, q.dtype), _with_dense_rows(k, q.dtype), _with_dense_rows(v, q.dtype)
        output = torch.empty(q.shape, dtype=q.dtype)
        sinks = None if rules.sinks is None else rules.sinks.detach().float().contiguous()
        _, _, block_size, num_kv_heads, head_dim = kv_cache_layer.shape
        keys = kv_cache_layer.data_ptr()
        arguments = _ARGUMENTS.pack(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            output.data_ptr(),
            keys,
            keys + kv_cache_layer.stride(0) * kv_cache_layer.itemsize,
            *_pointers(batch),
            0 if sinks is None else sinks.data_ptr(),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            batch.block_tables.stride(0),
            batch.num_seqs,
            batch.num_tokens,
            q.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            rules.sliding_window or 0,
            torch.get_num_threads(),
            _FORMATS[q.dtype],
            _FORMATS[kv_cache_layer.dtype],
            rules.scaling,
            rules.softcap or 0.0,
        )
        if self._attend(arguments) != 0:
            raise MemoryError("the attention kernel could not allocate its scratch memory")
        return output


def _pointers(batch: AttentionBatch) -> tuple[int, int, int, int]:
    """Query starts, context lengths, block tables and slots, of the types that the kernel reads."""
    for x in (batch.query_start, batch.context_lens):
        assert x.dtype == torch.int32 and x.is_contiguous(), "query_start and context_lens are int32 and contiguous"
    assert batch.slot_mapping.dtype == torch.int64 and batch.slot_mapping.is_contiguous(), "slot_mapping is int64"
    tables = batch.block_tables
    assert tables.dtype == torch.int32 and (tables.stride(1) == 1 or tables.shape[1] == 1), "block_tables is int32"
    return (
        batch.query_start.data_ptr(),
        batch.context_lens.data_ptr(),
        tables.data_ptr(),
        batch.slot_mapping.data_ptr(),
    )


def _with_dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype; the kernel takes any strides but the last."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()
