"""What are a CPU step's matrix products worth? All of SmolLM2-135M's, in each format, beside torch's own linear layers.

The contenders take turns, layer after layer as in a step; medians. 1, 8 and 64 rows are decodes, 512 a chunk of a
prompt. A rate is of multiply-adds.

    python -m benchmarks.linear_speed [--rounds 9]
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import Tensor, nn

from benchmarks.cpu_bound import LAYER_WEIGHTS, OUTPUT_WEIGHTS
from benchmarks.report import print_and_keep
from engine.model import bfloat16_linear, native_linear
from engine.model.devices import cpu_has_bfloat16
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.locate import default_cache_dir
from engine.model.onednn_linear import OneDnnLinear

NUM_LAYERS = 30
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # qkv, o, gate and up, down
ROWS = (1, 8, 64, 512)
Make = Callable[[Tensor, None], nn.Module]


@click.command()
@click.option("--rounds", default=9, show_default=True)
def main(rounds: int) -> None:
    kinds = contenders()
    models = {kind: build(dtype, make) for kind, (dtype, make) in kinds.items()}
    inputs = {kind: dtype for kind, (dtype, _) in kinds.items()}
    rows = [row for num_rows in ROWS for row in measure(models, inputs, num_rows, rounds)]
    note = f"all products of a step, {torch.get_num_threads()} threads, medians of {rounds} rounds in turn"
    print_and_keep("linear_speed", ["rows", "layers", "ms", "G multiply-adds/s", "float32's time / its"], rows, [note])


def contenders() -> dict[str, tuple[torch.dtype, Make]]:
    """Layers by name, with the dtype of their weights and rows."""
    kernels_dir = default_cache_dir() / "kernels"
    kinds: dict[str, tuple[torch.dtype, Make]] = {
        "float32": (
            torch.float32,
            partial(native_linear.NativeLinear, matmul=native_linear.load_matmul(kernels_dir)[1]),
        ),
        "int8": (
            torch.bfloat16 if cpu_has_bfloat16() else torch.float32,
            partial(Int8Linear, kernels=Int8Kernels(kernels_dir)),
        ),
        "torch float32": (torch.float32, torch_linear),
    }
    if bfloat16_linear.is_best_here():
        matmul = bfloat16_linear.load_matmul(kernels_dir)[1]
        kinds["bfloat16"] = torch.bfloat16, partial(bfloat16_linear.Bfloat16Linear, matmul=matmul)
    if cpu_has_bfloat16():
        kinds["oneDNN bfloat16, packed"] = torch.bfloat16, OneDnnLinear
        kinds["torch bfloat16"] = torch.bfloat16, torch_linear
    return kinds


def torch_linear(weight: Tensor, bias: None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def build(dtype: torch.dtype, make: Make) -> list[nn.Module]:
    """The products of a step in order; every layer has weights of its own, as a model's do not fit a cache."""
    shapes = [*SHAPES * NUM_LAYERS, (49_152, 576)]
    return [make((torch.randn(*shape) * shape[1] ** -0.5).to(dtype), None) for shape in shapes]


def measure(
    models: dict[str, list[nn.Module]], inputs: dict[str, torch.dtype], num_rows: int, rounds: int
) -> list[list[str]]:
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds):
        for kind, layers in models.items():
            rows = {size: torch.randn(num_rows, size).to(inputs[kind]) for size in (576, 1536)}
            seconds[kind].append(time_step(layers, rows))
    table = []
    for kind, own in seconds.items():
        median = statistics.median(own)
        speed = num_rows * (LAYER_WEIGHTS + OUTPUT_WEIGHTS) / median / 1e9
        ratio = statistics.median(a / b for a, b in zip(seconds["float32"], own, strict=True))
        table.append([str(num_rows), kind, f"{median * 1e3:.1f}", f"{speed:.0f}", f"{ratio:.2f}"])
    return table


@torch.inference_mode()
def time_step(layers: list[nn.Module], rows: dict[int, Tensor]) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(rows[int(layer.in_features)])  # type: ignore[arg-type]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
