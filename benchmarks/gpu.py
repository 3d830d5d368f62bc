"""Our engine on a GPU: first whether it computes rightly, then how fast, beside the device's limits and its peers.

Checks every kernel against its twin, the engine against transformers, and rows bit for bit in other batches; a check
that fails ends the run. Then times kernels, and the engine on U(100,1024) → U(100,1024) tokens with random weights,
alone, behind the queue, and its peers where they are installed. `--smoke` runs all of it in small on a CPU, under
Triton's interpreter, and keeps no result.

    python -m benchmarks.gpu [--sizes Qwen3-0.6B,Qwen3-8B] [--sequences 1,64,256] [--peers transformers,vllm]
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch

from benchmarks.cpu_peers import latencies
from benchmarks.gpu_checks import check_engine, check_kernels
from benchmarks.gpu_kernels import Timer, measure_limits, time_kernels
from benchmarks.gpu_models import MODELS, SIZES, SMOKE_SIZE, DeviceLimits, ModelSize, least_seconds, random_model
from benchmarks.gpu_race import PEERS, RaceSettings, first_job_seconds, idle_share, measure, ours, peer, queued
from benchmarks.peer_environment import PeerError
from benchmarks.report import print_and_keep, print_table
from benchmarks.workload import Workload, uniform_workload
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.small_tiles import set_small_tiles

KERNEL_COLUMNS = ["kernel", "case", "µs", "rate", "share of limit"]
ENGINE_COLUMNS = [
    "model",
    "sequences",
    "contender",
    "output tokens/s",
    "share of limit",
    "ours / its",
    "TTFT s",
    "ITL ms",
]


@click.command()
@click.option("--sizes", default=",".join(SIZES), show_default=True, help="Models, by comma.")
@click.option("--sequences", default="1,16,64,256,512", show_default=True, help="Prompts of a run, by comma.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Which peers, by comma.")
@click.option("--seed", type=int, help="Of the checks' inputs; default: another one each time.")
@click.option(
    "--smoke", is_flag=True, help="Everything in small on a CPU, under Triton's interpreter; keeps no result."
)
def main(sizes: str, sequences: str, peers: str, seed: int | None, smoke: bool) -> None:
    device = torch.device("cpu" if smoke else "cuda")
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --smoke runs on a CPU")
    seed = int.from_bytes(os.urandom(3)) if seed is None else seed
    speed_up_interpreter()
    if smoke:
        set_small_tiles(setattr)
    with model_root(smoke) as root:
        chosen = [SMOKE_SIZE] if smoke else [SIZES[name] for name in sizes.split(",")]
        check_all(chosen[0], device, seed, root)
        timer = Timer(device, rounds=1 if smoke else 20)
        limits = measure_limits(timer, num_bytes=1 << (20 if smoke else 32), matrix=64 if smoke else 8192)
        kernels = [row for size in chosen for row in time_kernels(size, timer, limits, is_smoke=smoke)]
        print_table(KERNEL_COLUMNS, kernels)
        counts = [2] if smoke else [int(count) for count in sequences.split(",")]
        rows, notes = [], [f"Checks passed with seed {seed}."]
        for size in chosen:
            settings = RaceSettings(random_model(size, device, root), device, smoke)
            rows += race(size, settings, counts, list(filter(None, peers.split(","))), limits, notes)
            notes.append(f"{size.name}: the first job ended {first_job_seconds(settings):.1f} s after the start.")
            if not smoke:
                idle = idle_share(settings, 256, min(size.vocab, 40_000))
                notes.append(f"{size.name}: the GPU was idle for {idle:.1%} of 50 decode steps of 256 sequences.")
    notes.append(f"Limits: {limits.bytes_a_second / 1e12:.3g} TB/s copied, {limits.flops_a_second / 1e12:.3g} TFLOP/s.")
    if smoke:
        print_table(ENGINE_COLUMNS, rows)
        print("\n".join(notes), "smoke run: no result is kept", sep="\n")
        return
    notes += [f"{row[0]}, {row[1]}: {row[2]} µs, {row[3]}, {row[4]} of the limit." for row in kernels]
    print_and_keep("gpu", ENGINE_COLUMNS, rows, [f"On {torch.cuda.get_device_name()}.", *notes])


@contextmanager
def model_root(is_smoke: bool) -> Iterator[Path]:
    """Where the models lie: random weights of real sizes are kept."""
    if not is_smoke:
        yield MODELS
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def check_all(size: ModelSize, device: torch.device, seed: int, root: Path) -> None:
    results = check_kernels(size, device, seed)
    results |= check_engine(random_model(size, device, root), device, num_tokens=300 if device.type == "cuda" else 9)
    print_table(["check", "result"], [[name, result] for name, result in results.items()])
    if any(result != "ok" for result in results.values()):
        raise SystemExit(f"a check failed with seed {seed}")


def race(
    size: ModelSize, settings: RaceSettings, counts: list[int], peers: list[str], limits: DeviceLimits, notes: list[str]
) -> list[list[str]]:
    """The table's rows of one model. Contenders come one after the other: each takes the device's memory."""
    lengths = (4, 8) if settings.is_smoke else (100, 1024)
    end_id = min(size.vocab, 40_000)
    workloads = [uniform_workload(count, lengths, lengths, seed=count, end_id=end_id) for count in counts]
    if not settings.is_smoke:  # for the time to the first token
        workloads.append(uniform_workload(16, (512, 512), (32, 32), seed=0, end_id=end_id))
    rows: list[list[str]] = []
    seconds: dict[str, list[float]] = {}
    for name in ["promptmill", "promptmill, queued", *peers]:
        with ExitStack() as stack:
            try:
                start = {"promptmill": ours, "promptmill, queued": queued}.get(name)
                contender = stack.enter_context(peer(name, settings) if start is None else start(settings))
                runs = measure(contender, workloads, end_id)
            except (PeerError, BrokenPipeError) as error:
                notes.append(f"{size.name}: {name} has no figures: {error}")
                continue
        seconds[name] = [run["seconds"] for run in runs]
        for i, (workload, run) in enumerate(zip(workloads, runs, strict=True)):
            share = least_seconds(size, workload, limits) / run["seconds"]
            ratio = run["seconds"] / seconds["promptmill"][i]
            speed = workload.num_output_tokens / run["seconds"]
            rows.append(
                [size.name, title(workload), name, f"{speed:.0f}", f"{share:.0%}", f"{ratio:.2f}", *latencies([run])]
            )
    return sorted(rows, key=lambda row: row[1])


def title(workload: Workload) -> str:
    return f"{len(workload.prompts):>3} x {statistics.mean(map(len, workload.prompts)):.0f}"


if __name__ == "__main__":
    main()
