"""Which matrix product can `deterministic` have: does a row keep its bits in every batch, and what does that cost?

Our own kernel, and the GPU's libraries with and without split-K: a library without it may still choose another kernel,
with another order of additions, for another number of rows. Every layer of a model's shape is tried with every number
of rows that a step may be padded to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu_models import ModelSize
from benchmarks.gpu_timer import Timer
from engine.model.triton_linear import TritonLinear
from engine.runner.step_shapes import MAX_MIXED_TOKENS, decode_bucket, mixed_bucket

_TIMED_ROWS = (16, 64, 256, 2048)
_SMOKE_ROWS = [2, 3]


@dataclass(frozen=True, slots=True)
class _Product:
    """A way to multiply: `make` gives the function of rows for a weight `[out_features, in_features]`."""

    make: Callable[[Tensor], Callable[[Tensor], Tensor]]
    library: str | None = None  # torch's name of it; None: no library's
    has_split_k: bool = True


def _plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: nn.functional.linear(rows, weight)


def _ours(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return TritonLinear(weight, None).forward


PRODUCTS = {
    "the library": _Product(_plain),
    "cuBLAS without split-K": _Product(_plain, "cublas", has_split_k=False),
    "cuBLASLt": _Product(_plain, "cublaslt"),
    "cuBLASLt without split-K": _Product(_plain, "cublaslt", has_split_k=False),
    "ours": _Product(_ours),
}


def layers_of(size: ModelSize) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) by name."""
    q_size, kv_size = size.heads * size.head_dim, size.kv_heads * size.head_dim
    return {
        "qkv": (q_size + 2 * kv_size, size.hidden),
        "o": (size.hidden, q_size),
        "gate_up": (2 * size.intermediate, size.hidden),
        "down": (size.hidden, size.intermediate),
        "head": (size.vocab, size.hidden),
    }


def compare_linears(size: ModelSize, timer: Timer, *, is_smoke: bool) -> Iterator[list[str]]:
    """Rows of `gpu_report.LINEAR_COLUMNS`."""
    with torch.inference_mode():
        for layer, shape in layers_of(size).items():
            num_rows = _SMOKE_ROWS if is_smoke else padded_rows(layer)
            timed = _SMOKE_ROWS[:1] if is_smoke else [rows for rows in _TIMED_ROWS if rows in num_rows]
            yield from _of_layer(size.name, layer, shape, timer, num_rows, timed)


def padded_rows(layer: str) -> list[int]:
    """All numbers of rows that a padded step computes this layer with; the head sees sampled rows alone."""
    decodes = sorted({decode_bucket(num_seqs) for num_seqs in range(1, 513)})
    mixed = {mixed_bucket(num_tokens) for num_tokens in range(1, MAX_MIXED_TOKENS + 1)}
    return decodes if layer == "head" else sorted({*decodes, *mixed})


def _of_layer(
    model: str,
    layer: str,
    shape: tuple[int, int],
    timer: Timer,
    num_rows: "list[int] | tuple[int, ...]",
    timed: list[int],
) -> Iterator[list[str]]:
    generator = torch.Generator(timer.device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=timer.device).to(torch.bfloat16)

    weights = draw(timer.num_sets(2 * shape[0] * shape[1]), *shape) * shape[1] ** -0.5
    x = draw(max(num_rows), shape[1])
    library: dict[int, float] = {}
    for name, product in PRODUCTS.items():
        try:
            with _settings(product):
                functions = [product.make(weight) for weight in weights]
                others = different_rows(functions[0], x, num_rows)
                seconds = {rows: _seconds(functions, x[:rows], timer) for rows in timed}
        except (RuntimeError, TypeError, AttributeError) as error:  # not in this torch, or not on this device
            yield [model, layer, name, f"not to be had: {str(error).partition(chr(10))[0][:100]}", "-"]
            continue
        library = library or seconds
        ratios = ", ".join(f"{rows}: {took / library[rows]:.2f}" for rows, took in seconds.items())
        yield [model, layer, name, ", ".join(map(str, others)) or "none", ratios]


def _seconds(functions: list[Callable[[Tensor], Tensor]], x: Tensor, timer: Timer) -> float:
    return timer.seconds(lambda i: functions[i](x), len(functions))


def different_rows(
    product: Callable[[Tensor], Tensor], x: Tensor, num_rows: "list[int] | tuple[int, ...]"
) -> list[int]:
    """The numbers of rows with which some row has other bits than among all of x; first and last rows are tried."""
    whole = product(x)
    return [
        rows
        for rows in num_rows
        if not torch.equal(product(x[:rows]), whole[:rows]) or not torch.equal(product(x[-rows:]), whole[-rows:])
    ]


@contextmanager
def _settings(product: _Product) -> Iterator[None]:
    """torch's choice of library, and whether it may split K, which goes with reductions in 16 bits."""
    if product.library is None:
        yield
        return
    matmul = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(product.library)
    try:
        if not product.has_split_k:
            matmul.allow_bf16_reduced_precision_reduction = (False, False)
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = True
