"""How much sooner is a CPU step's work done in int8? All matrix products of SmolLM2-135M, beside those in float32.

The two take turns, layer after layer as in a step; medians. 1, 8 and 64 rows are decodes, 512 a chunk of a prompt.

    python -m benchmarks.int8_speed [--rounds 9]
"""

import statistics
import time

import click
import torch
from torch import Tensor, nn

from benchmarks.cpu_bound import LAYER_WEIGHTS, OUTPUT_WEIGHTS
from benchmarks.report import print_and_keep
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.locate import default_cache_dir
from engine.model.native_linear import NativeLinear, load_matmul

NUM_LAYERS = 30
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # qkv, o, gate and up, down
ROWS = (1, 8, 64, 512)


@click.command()
@click.option("--rounds", default=9, show_default=True)
def main(rounds: int) -> None:
    models = build()
    rows = [measure(models, num_rows, rounds) for num_rows in ROWS]
    columns = ["rows", "float32 ms", "int8 ms", "float32 / int8", "int8 G multiply-adds/s"]
    note = f"all products of a step, {torch.get_num_threads()} threads, medians of {rounds} rounds, the two in turn"
    print_and_keep("int8_speed", columns, rows, [note])


def build() -> dict[str, list[nn.Module]]:
    """The products of a step in order; every layer has weights of its own, as a model's do not fit a cache."""
    kernels_dir = default_cache_dir() / "kernels"
    kernels, (_, matmul) = Int8Kernels(kernels_dir), load_matmul(kernels_dir)
    models: dict[str, list[nn.Module]] = {"float32": [], "int8": []}
    for out_features, in_features in [*SHAPES * NUM_LAYERS, (49_152, 576)]:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        models["float32"].append(NativeLinear(weight, None, matmul))
        models["int8"].append(Int8Linear(weight, None, kernels))
    return models


def measure(models: dict[str, list[nn.Module]], num_rows: int, rounds: int) -> list[str]:
    inputs = {size: torch.randn(num_rows, size) for size in (576, 1536)}
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds):
        for kind, layers in models.items():
            seconds[kind].append(time_step(layers, inputs))
    plain, quantised = (statistics.median(seconds[kind]) for kind in ("float32", "int8"))
    ratio = statistics.median(a / b for a, b in zip(seconds["float32"], seconds["int8"], strict=True))
    speed = num_rows * (LAYER_WEIGHTS + OUTPUT_WEIGHTS) / quantised / 1e9
    return [str(num_rows), f"{plain * 1e3:.1f}", f"{quantised * 1e3:.1f}", f"{ratio:.2f}", f"{speed:.0f}"]


def time_step(layers: list[nn.Module], inputs: dict[int, Tensor]) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(inputs[int(layer.in_features)])  # type: ignore[arg-type]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
