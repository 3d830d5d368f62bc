"""How fast the GPU's kernels are, as shares of the copy bandwidth and the matrix rate measured beside them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_cpu import build_batch
from benchmarks.gpu_models import DeviceLimits, ModelSize
from benchmarks.gpu_timer import Timer
from engine.attention.base import AttentionBatch, AttentionRules, PageSlots
from engine.attention.triton_backend import TritonAttention
from engine.model.norm_rule import NormRule
from engine.model.triton_rows import TritonRows
from engine.triton_sampling import TritonSampler
from tests.fakes.sampling_batches import batch_of, random_batch


def measure_limits(timer: Timer, *, num_bytes: int, matrix: int) -> DeviceLimits:
    """A copy far larger than the caches, and a square product in bfloat16.

    The copy is a kernel's: within a graph, torch's own is a copy engine's, which is slower.
    """
    source = torch.randn(num_bytes // 4, device=timer.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, matrix, matrix, device=timer.device).to(torch.bfloat16)
    return DeviceLimits(
        bytes_a_second=2 * num_bytes / timer.seconds(lambda _: torch.neg(source, out=target)),
        flops_a_second=2 * matrix**3 / timer.seconds(lambda _: torch.mm(a, b)),
    )


def time_kernels(size: ModelSize, timer: Timer, limits: DeviceLimits, *, is_smoke: bool) -> Iterator[list[str]]:
    """Rows of kernel, case, microseconds, rate and share of the limit; by the bytes or operations that it must do."""
    decodes = [(2, 20)] if is_smoke else [(64, 1024), (16, 1024), (256, 1024), (1, 1024), (1, 8192), (16, 8192)]
    prefills = [20] if is_smoke else [512, 4096]
    num_rows = 4 if is_smoke else 256
    for num_seqs, context in decodes:
        yield _decode(size, timer, limits, num_seqs, context)
    for length in prefills:
        yield _prefill(size, timer, limits, length)
    yield from _rows(size, timer, limits, num_rows)
    yield from _samplers(size, timer, num_rows, limits)


def by_bytes(name: str, case: str, seconds: float, num_bytes: float, limits: DeviceLimits) -> list[str]:
    share = num_bytes / seconds / limits.bytes_a_second
    return [name, case, f"{seconds * 1e6:.1f}", f"{num_bytes / seconds / 1e9:.3g} GB/s", f"{share:.0%}"]


def by_flops(name: str, case: str, seconds: float, flops: float, limits: DeviceLimits) -> list[str]:
    share = flops / seconds / limits.flops_a_second
    return [name, case, f"{seconds * 1e6:.1f}", f"{flops / seconds / 1e12:.3g} TFLOP/s", f"{share:.0%}"]


def _decode(size: ModelSize, timer: Timer, limits: DeviceLimits, num_seqs: int, context: int) -> list[str]:
    seconds = attention_seconds(size, timer, [(1, context)] * num_seqs)
    num_bytes = num_seqs * context * size.kv_bytes / size.layers
    return by_bytes("decode attention", f"{num_seqs} x {context}", seconds, num_bytes, limits)


def _prefill(size: ModelSize, timer: Timer, limits: DeviceLimits, length: int) -> list[str]:
    seconds = attention_seconds(size, timer, [(length, length)])
    flops = 2 * size.heads * size.head_dim * length**2
    return by_flops("prefill attention", f"1 x {length}", seconds, flops, limits)


def attention_seconds(size: ModelSize, timer: Timer, parts: list[tuple[int, int]]) -> float:
    batch, num_blocks = build_batch(parts)
    moved = AttentionBatch(
        query_start=batch.query_start.to(timer.device),
        context_lens=batch.context_lens.to(timer.device),
        block_tables=batch.block_tables.to(timer.device),
        slot_mapping=batch.slot_mapping.to(timer.device),
        num_seqs=batch.num_seqs,
        num_tokens=batch.num_tokens,
        max_query_len=batch.max_query_len,
        max_context_len=batch.max_context_len,
    )
    num_sets = timer.num_sets(sum(context for _, context in parts) * size.kv_bytes // size.layers)
    pages = _draw(timer, num_sets, 2, num_blocks, 16, size.kv_heads, size.head_dim)
    q = _draw(timer, batch.num_tokens, size.heads, size.head_dim)
    backend, rules = TritonAttention(), AttentionRules(size.head_dim**-0.5)

    def attend(i: int) -> Tensor:
        return backend.attend(q, pages[i], moved, rules)

    return timer.seconds(attend, num_sets)


def _rows(size: ModelSize, timer: Timer, limits: DeviceLimits, num_rows: int) -> list[list[str]]:
    rows = TritonRows()
    num_sets = timer.num_sets(4 * num_rows * size.hidden)
    x, residual = _draw(timer, 2, num_sets, num_rows, size.hidden)
    weight = _draw(timer, size.hidden)
    rule = NormRule(1e-6, False, True)
    gate_up = _draw(timer, num_sets, num_rows, 2 * size.intermediate)
    qkv = _draw(timer, num_sets, num_rows, (size.heads + 2 * size.kv_heads) * size.head_dim)
    angles = _draw(timer, num_rows, size.head_dim), _draw(timer, num_rows, size.head_dim)
    pages = PageSlots.beside(qkv[0], size.kv_heads, size.head_dim)
    runs: dict[str, tuple[Callable[[int], object], int]] = {
        "add + norm": (lambda i: rows.add_norm(x[i], residual[i], weight, rule), 8 * x[0].numel()),
        "silu · mul": (lambda i: rows.glu(gate_up[i], is_gelu=False), 3 * gate_up[0].numel()),
        "rotate + write": (
            lambda i: rows.rotate_and_write(qkv[i], angles, None, pages, num_heads=size.heads),
            4 * qkv[0].numel(),
        ),
    }
    case = f"{num_rows} rows"
    return [by_bytes(name, case, timer.seconds(run, num_sets), count, limits) for name, (run, count) in runs.items()]


def _samplers(size: ModelSize, timer: Timer, num_rows: int, limits: DeviceLimits) -> Iterator[list[str]]:
    """By one reading of the logits, as if nothing else were to be done."""
    logits = torch.randn(num_rows, size.vocab, device=timer.device) * 3
    flat = logits / 3
    top_p = batch_of(num_rows, top_p=0.9)
    cases = {
        "greedy": (logits, replace(batch_of(num_rows, temperature=0.0), may_draw=False, may_cut=False)),  # as known
        "drawn": (logits, replace(batch_of(num_rows), may_cut=False)),
        "top-p": (logits, top_p),
        "top-p of flat rows": (flat, top_p),
        "all filters": (logits, random_batch(num_rows, seed=0)),
    }
    for name, (rows, batch) in cases.items():
        sample = partial(TritonSampler().sample, rows, batch.to(timer.device))
        seconds = timer.seconds(lambda _, sample=sample: sample())  # type: ignore[misc]
        yield by_bytes(f"sampler, {name}", f"{num_rows} x {size.vocab}", seconds, 4 * logits.numel(), limits)


def _draw(timer: Timer, *shape: int) -> Tensor:
    return torch.randn(shape, device=timer.device).to(torch.bfloat16)
