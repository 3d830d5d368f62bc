"""How fast the GPU's kernels are, as shares of the copy bandwidth and the matrix rate measured beside them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.attention_cpu import build_batch
from benchmarks.gpu_models import DeviceLimits, ModelSize
from engine.attention.base import AttentionBatch, PageSlots
from engine.attention.triton_backend import TritonAttention
from engine.model.triton_linear import TritonLinear
from engine.model.triton_rows import NormRule, TritonRows
from engine.triton_sampling import TritonSampler
from tests.fakes.sampling_batches import random_batch


@dataclass(frozen=True, slots=True)
class Timer:
    """Times calls on one device."""

    device: torch.device
    rounds: int

    def seconds(self, run: Callable[[], object]) -> float:
        """The median of a call, after one that compiles and warms up."""
        run()
        samples = []
        for _ in range(self.rounds):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_limits(timer: Timer, *, num_bytes: int, matrix: int) -> DeviceLimits:
    """A copy far larger than the caches, and a square product in bfloat16."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, matrix, matrix, device=timer.device).to(torch.bfloat16)
    return DeviceLimits(
        bytes_a_second=2 * num_bytes / timer.seconds(lambda: target.copy_(source)),
        flops_a_second=2 * matrix**3 / timer.seconds(lambda: torch.mm(a, b)),
    )


def time_kernels(size: ModelSize, timer: Timer, limits: DeviceLimits, *, is_smoke: bool) -> list[list[str]]:
    """Rows of kernel, case, microseconds, rate and share of the limit; by the bytes or operations that it must do."""
    decodes = [(2, 20)] if is_smoke else [(16, 1024), (64, 1024), (256, 1024), (16, 8192)]
    prefills = [20] if is_smoke else [512, 4096]
    num_rows = 4 if is_smoke else 256
    table = [_decode(size, timer, limits, num_seqs, context) for num_seqs, context in decodes]
    table += [_prefill(size, timer, limits, length) for length in prefills]
    table += _rows(size, timer, limits, num_rows)
    table += [_linear(size, timer, limits, rows) for rows in ((num_rows,) if is_smoke else (num_rows, 8192))]
    table.append(_sampler(size, timer, num_rows, limits))
    return table


def _by_bytes(name: str, case: str, seconds: float, num_bytes: float, limits: DeviceLimits) -> list[str]:
    share = num_bytes / seconds / limits.bytes_a_second
    return [name, case, f"{seconds * 1e6:.1f}", f"{num_bytes / seconds / 1e9:.3g} GB/s", f"{share:.0%}"]


def _by_flops(name: str, case: str, seconds: float, flops: float, limits: DeviceLimits) -> list[str]:
    share = flops / seconds / limits.flops_a_second
    return [name, case, f"{seconds * 1e6:.1f}", f"{flops / seconds / 1e12:.3g} TFLOP/s", f"{share:.0%}"]


def _decode(size: ModelSize, timer: Timer, limits: DeviceLimits, num_seqs: int, context: int) -> list[str]:
    seconds = _attention_seconds(size, timer, [(1, context)] * num_seqs)
    num_bytes = num_seqs * context * size.kv_bytes / size.layers
    return _by_bytes("decode attention", f"{num_seqs} x {context}", seconds, num_bytes, limits)


def _prefill(size: ModelSize, timer: Timer, limits: DeviceLimits, length: int) -> list[str]:
    seconds = _attention_seconds(size, timer, [(length, length)])
    flops = 2 * size.heads * size.head_dim * length**2
    return _by_flops("prefill attention", f"1 x {length}", seconds, flops, limits)


def _attention_seconds(size: ModelSize, timer: Timer, parts: list[tuple[int, int]]) -> float:
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
    pages = _draw(timer, 2, num_blocks, 16, size.kv_heads, size.head_dim)
    q = _draw(timer, batch.num_tokens, size.heads, size.head_dim)
    backend, rules = TritonAttention(), {"sliding_window": None, "softcap": None, "sinks": None}
    scaling = size.head_dim**-0.5
    return timer.seconds(lambda: backend.attend(q, pages, moved, scaling=scaling, **rules))  # type: ignore[arg-type]


def _rows(size: ModelSize, timer: Timer, limits: DeviceLimits, num_rows: int) -> list[list[str]]:
    rows = TritonRows()
    x, residual, weight = (
        _draw(timer, num_rows, size.hidden),
        _draw(timer, num_rows, size.hidden),
        _draw(timer, size.hidden),
    )
    rule = NormRule(1e-6, False, True)
    gate_up = _draw(timer, num_rows, 2 * size.intermediate)
    qkv = _draw(timer, num_rows, (size.heads + 2 * size.kv_heads) * size.head_dim)
    angles = _draw(timer, num_rows, size.head_dim), _draw(timer, num_rows, size.head_dim)
    pages = PageSlots.beside(qkv, size.kv_heads, size.head_dim)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "add + norm": (lambda: rows.add_norm(x, residual, weight, rule), 8 * x.numel()),
        "silu · mul": (lambda: rows.glu(gate_up, is_gelu=False), 3 * gate_up.numel()),
        "rotate + write": (
            lambda: rows.rotate_and_write(qkv, angles, None, pages, num_heads=size.heads),
            4 * qkv.numel(),
        ),
    }
    case = f"{num_rows} rows"
    return [_by_bytes(name, case, timer.seconds(run), count, limits) for name, (run, count) in runs.items()]


def _linear(size: ModelSize, timer: Timer, limits: DeviceLimits, num_rows: int) -> list[str]:
    """The product of `deterministic`; its case names how much longer it takes than the library's."""
    weight = _draw(timer, 2 * size.intermediate, size.hidden)
    x, layer = _draw(timer, num_rows, size.hidden), TritonLinear(weight, None)
    library = timer.seconds(lambda: nn.functional.linear(x, weight))
    seconds = timer.seconds(lambda: layer(x))
    case = f"{num_rows} rows, {seconds / library:.2f} x the library's time"
    return _by_flops("deterministic linear", case, seconds, 2 * num_rows * weight.numel(), limits)


def _sampler(size: ModelSize, timer: Timer, num_rows: int, limits: DeviceLimits) -> list[str]:
    logits = torch.randn(num_rows, size.vocab, device=timer.device) * 3
    batch = random_batch(num_rows, seed=0)
    for name in batch.__slots__:
        setattr(batch, name, getattr(batch, name).to(timer.device))
    seconds = timer.seconds(lambda: TritonSampler().sample(logits, batch))
    return _by_bytes("sampler, all filters", f"{num_rows} x {size.vocab}", seconds, 4 * logits.numel(), limits)


def _draw(timer: Timer, *shape: int) -> Tensor:
    return torch.randn(shape, device=timer.device).to(torch.bfloat16)
