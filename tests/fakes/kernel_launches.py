"""Launches of every Triton kernel, as models of common shapes make them."""

import torch

from engine.attention.base import AttentionRules, PageSlots
from engine.attention.triton_backend import TritonAttention
from engine.model.norm_rule import NormRule
from engine.model.triton_linear import TritonLinear
from engine.model.triton_rows import HeadNorms, TritonRows
from engine.triton_sampling import TritonLogitEditor, TritonSampler
from tests.fakes.paged_batches import PagedWorld
from tests.fakes.sampling_batches import random_batch

_ATTENTIONS = [
    # num_heads, num_kv_heads, head_dim, dtype
    (32, 8, 128, torch.bfloat16),
    (16, 8, 128, torch.bfloat16),
    (32, 8, 128, torch.float32),
    (9, 3, 64, torch.float16),
    (8, 4, 256, torch.bfloat16),
]


def launch_every_kernel() -> None:
    """All kernels, attention under all its rules."""
    for num_heads, num_kv_heads, head_dim, dtype in _ATTENTIONS:
        world = PagedWorld.build(
            [600, 40], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
        )
        rules = AttentionRules(0.1)
        if head_dim != 128:
            rules = AttentionRules(0.1, sliding_window=100, softcap=20.0, sinks=torch.zeros(num_heads))
        decodes = [[(0, 599, 600), (1, 39, 40)], [(1, 39, 40)]]  # in splits, and in one
        for parts in ([(0, 0, 599), (1, 0, 39)], *decodes, [(0, 599, 600), (1, 0, 39)]):
            q, k, v, batch = world.step(parts)
            batch.is_open = batch.max_query_len > 1 and parts[0][1] > 0  # as a graph of mixed steps is
            for is_deterministic in (False, True):
                TritonAttention(deterministic=is_deterministic).forward(q, k, v, world.kv_cache, batch, rules)
    world = PagedWorld.build([40] * 140, num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    q, k, v, batch = world.step([(i, 39, 40) for i in range(140)])  # so many that their tiles are larger
    TritonAttention().forward(q, k, v, world.kv_cache, batch, AttentionRules(0.1))
    for dtype in (torch.bfloat16, torch.float32):
        _launch_rows(dtype)
    _launch_sampler()


def _launch_rows(dtype: torch.dtype) -> None:
    rows, rule = TritonRows(), NormRule(1e-6, False, True)
    x, weight = torch.zeros(4, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    rows.norm(x, x, weight, NormRule(1e-6, True, False))
    rows.add_norm(x, x, weight, rule)
    rows.glu(x, is_gelu=False)
    rows.glu(x, is_gelu=True)
    merged, angles = torch.zeros(4, 48 * 128, dtype=dtype), torch.zeros(4, 128, dtype=dtype)
    norms, pages = HeadNorms(weight[:128], weight[:128], rule), PageSlots.beside(merged, 8, 128)
    rows.rotate_and_write(merged, (angles, angles), norms, pages, num_heads=32)
    rows.rotate_and_write(merged, None, None, pages, num_heads=32)
    TritonLinear(torch.zeros(64, 128, dtype=dtype), weight[:64])(torch.zeros(3, 128, dtype=dtype))


def _launch_sampler() -> None:
    logits, rows, floats = torch.zeros(8, 151_936), torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    for dtype in (torch.float32, torch.bfloat16):
        TritonSampler().settle(logits.to(dtype), TritonSampler().sample(logits.to(dtype), random_batch(8, seed=0)))
    TritonSampler().mask(logits, rows, torch.zeros(5, 4748, dtype=torch.int32))
    nothing, no_floats = rows[:0], floats[:0]
    edits = [nothing, nothing, no_floats, rows, floats, floats, floats, rows, rows, floats, nothing, nothing]
    TritonLogitEditor(*edits).apply(logits)
