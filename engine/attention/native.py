"""Paged attention on a CPU through engine/kernels/attention.c: checks shapes and passes pointers.

The kernel is compiled when the backend is made; it shares torch's OpenMP threads. Its pages are laid out for it, as
kernels/attention_pages.h says.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from engine.attention.base import AttentionBatch, AttentionRules
from engine.kernels.build import build_library, load_library
from engine.kernels.native_function import FORMATS, NativeFunction

DTYPES = (torch.float32, torch.bfloat16)  # keys and values may be float16 and int8, too

# Of `attention_args` in attention_rows.h: what a layer's call is given, and what is a step's.
_CALL = struct.Struct("@6P6q6i2f2i")
_WRITE, _ATTEND = 1, 2
_STEP = struct.Struct("@5P3q4i")
_Step: TypeAlias = "ctypes.Array[ctypes.c_char]"


class NativeAttention:
    """`ChainedBackend` for float32 and bfloat16 on a CPU. Raises `KernelBuildError` where it cannot be compiled."""

    name = "native"
    is_row_invariant = True

    def __init__(self, kernels_dir: Path) -> None:
        path = build_library("attention", kernels_dir)
        self._attend = NativeFunction(load_library(path), "promptmill_attention")
        self._step = ctypes.create_string_buffer(_STEP.size)
        self._steps_of_bands: list[_Step] = []
        self._bands: tuple[Sequence[AttentionBatch], Tensor] | None = None
        self._entered: tuple[AttentionBatch, Tensor] | None = None
        self.build = path.stem

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        q, k, v = _with_dense_rows(q, q.dtype), _with_dense_rows(k, q.dtype), _with_dense_rows(v, q.dtype)
        output = torch.empty(q.shape, dtype=q.dtype)
        sinks = None if rules.sinks is None else rules.sinks.detach().float().contiguous()
        _set_step(self._step, batch, kv_cache_layer[None])
        self._entered = None
        self._attend(_call(self._step, q, k, v, output, 0, rules, sinks, _WRITE | _ATTEND))
        return output

    def enter(self, batch: AttentionBatch, kv_cache: Tensor) -> None:
        """See `ChainedBackend.enter`."""
        if self._entered is None or batch is not self._entered[0] or kv_cache is not self._entered[1]:
            _set_step(self._step, batch, kv_cache)
            self._entered = batch, kv_cache  # held, because the step has the addresses of what they hold

    def enter_bands(self, bands: Sequence[AttentionBatch], kv_cache: Tensor) -> None:
        """See `ChainedBackend.enter_bands`."""
        for band, batch in enumerate(bands):
            _set_step(self._step_of(band), batch, kv_cache)
        self._bands = bands, kv_cache

    def _step_of(self, band: int | None) -> _Step:
        if band is None:
            return self._step
        while band >= len(self._steps_of_bands):
            self._steps_of_bands.append(ctypes.create_string_buffer(_STEP.size))
        return self._steps_of_bands[band]

    def links(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        layer: int,
        rules: AttentionRules,
        band: int | None = None,
    ) -> list[bytes] | None:
        """See `ChainedBackend.links`."""
        if rules.sinks is not None:  # nobody would hold them in the kernel's dtype
            return None
        assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and out.is_contiguous(), "dense rows"
        call = partial(_call, self._step_of(band), q, k, v, out, layer, rules, None)
        parts = (_WRITE | _ATTEND,) if band is None else (_WRITE, _ATTEND)
        return [self._attend.link(call(part)) for part in parts]


def _call(
    step: _Step,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    layer: int,
    rules: AttentionRules,
    sinks: Tensor | None,
    parts: int,
) -> bytes:
    return _CALL.pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        ctypes.addressof(step),
        0 if sinks is None else sinks.data_ptr(),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        layer,
        q.shape[1],
        k.shape[1],
        k.shape[2],
        rules.sliding_window or 0,
        torch.get_num_threads(),
        rules.scaling,
        rules.softcap or 0.0,
        FORMATS[q.dtype],
        parts,
    )


def _set_step(step: _Step, batch: AttentionBatch, kv_cache: Tensor) -> None:
    """kv_cache: `[num_layers, 2, num_blocks, block_size, num_kv_heads, slot_width]`."""
    tables, slots = batch.block_tables, batch.slot_mapping
    for x in (batch.query_start, batch.context_lens):
        assert x.dtype == torch.int32 and x.is_contiguous(), "query_start and context_lens are int32 and contiguous"
    assert slots.dtype == torch.int64 and slots.is_contiguous(), "slot_mapping is int64"
    assert tables.dtype == torch.int32 and (tables.stride(1) == 1 or tables.shape[1] == 1), "block_tables is int32"
    _STEP.pack_into(
        step,
        0,
        batch.query_start.data_ptr(),
        batch.context_lens.data_ptr(),
        tables.data_ptr(),
        slots.data_ptr(),
        kv_cache.data_ptr(),
        kv_cache.stride(0) * kv_cache.itemsize,
        kv_cache.stride(1) * kv_cache.itemsize,
        tables.stride(0),
        batch.num_seqs,
        batch.num_tokens,
        kv_cache.shape[3],
        FORMATS[kv_cache.dtype],
    )


def _with_dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype; the kernel takes any strides but the last."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()
